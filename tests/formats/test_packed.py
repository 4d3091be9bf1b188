"""What holds for every packed format: bytes as promised, the same shape, dtypes, stacks; and what does not divide."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsai.errors import InputError
from hsai.formats import (
    DenseConfig,
    Int2Config,
    Int3Config,
    Int4Config,
    Int4Offset,
    Int4OffsetConfig,
    Int8Config,
    NMConfig,
    NMInt4Config,
    NMInt8Config,
    Packed,
    SparseConfig,
    TernaryConfig,
    UnstructuredConfig,
    UnstructuredInt4Config,
    UnstructuredInt8Config,
    bits_per_weight,
    nbytes,
    to_dense,
)
from hsai.formats.nm import PATTERNS, index_block

PACKED = [
    Int8Config(),
    Int4Config(group=32),
    Int4Config(group=128),
    NMConfig(n=1),
    NMConfig(n=3, dtype="float32"),
    NMInt4Config(n=2, group=64),
    NMInt4Config(n=3, group=32),
    NMConfig(n=4, m=8, dtype="float32"),
    TernaryConfig(group=32),
    TernaryConfig(group=None),
    NMInt4Config(n=2, m=8, group=32),
    Int3Config(group=32),
    Int2Config(group=32),
    NMInt8Config(n=2),
    NMInt8Config(n=2, m=8),
    UnstructuredConfig(density=0.25, dtype="float32"),
    UnstructuredInt8Config(density=0.625, block=32),
    UnstructuredInt4Config(block=128, group=64),
    Int4OffsetConfig(group=32),
]
FORMATS = [
    *PACKED,
    DenseConfig(dtype="bfloat16"),
    DenseConfig(dtype="float32"),
    *(make(group=group) for make in (Int2Config, Int3Config) for group in (64, 128)),
    Int4Config(group=64),
    *(Int4OffsetConfig(group=group) for group in (64, 128)),
    NMConfig(n=2),
    *(NMInt4Config(n=n, m=m, group=group) for n, m in PATTERNS for group in (32, 64, 128)),
    *(NMConfig(n=n, m=8) for n in (1, 2)),
    UnstructuredConfig(density=3 / 64),
    UnstructuredInt4Config(density=0.375, group=128),
]


def block_of(format) -> int:
    """The smallest contraction that the format can hold."""
    blocks = [1]
    if isinstance(format, Int2Config | Int3Config | Int4Config | Int4OffsetConfig | NMInt4Config | TernaryConfig):
        blocks.append(format.group or 16)
    if isinstance(format, NMConfig | NMInt8Config | NMInt4Config):
        blocks.append(index_block(format.n, format.m))
    elif isinstance(format, SparseConfig):
        blocks += [format.counts[1], format.scale_group or 1]
    return max(blocks)


def draw(shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)


@settings(deadline=None, max_examples=100)
@given(
    format=st.sampled_from(FORMATS),
    stack=st.sampled_from([(), (1,), (3,), (2, 3)]),
    blocks=st.integers(1, 3),
    outputs=st.sampled_from([1, 5, 8, 33]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_bytes_are_the_invariants_arithmetic(format, stack, blocks, outputs, dtype) -> None:
    shape = (*stack, blocks * block_of(format), outputs)
    packed = jax.eval_shape(format.pack, jax.ShapeDtypeStruct(shape, dtype))
    assert packed.shape == shape and packed.size == math.prod(shape) and packed.ndim == len(shape)
    assert nbytes(packed) * 8 == round(format.invariant_bits(shape[-2]) * math.prod(shape))
    assert bits_per_weight(packed) == pytest.approx(format.invariant_bits(shape[-2]), rel=1e-12)
    dense = jax.eval_shape(to_dense, packed)
    assert dense.shape == shape
    assert dense.dtype == (jnp.float32 if isinstance(packed, Packed) else jnp.dtype(format.dtype))


@pytest.mark.parametrize(
    ("format", "bits"),
    [
        (DenseConfig(), 16),
        (Int8Config(), 8 + 32 / 256),
        (Int4Config(group=64), 4.25),
        (Int4OffsetConfig(group=32), 5),
        (Int4OffsetConfig(group=128), 4.25),
        (Int3Config(group=64), 3.25),
        (Int3Config(group=128), 3.125),
        (Int2Config(group=64), 2.25),
        (Int2Config(group=128), 2.125),
        (TernaryConfig(group=64), 2.25),
        (TernaryConfig(group=None), 2 + 16 / 256),
        (NMConfig(n=2), 9),
        (NMConfig(n=1, dtype="float32"), 8.5),
        (NMInt8Config(n=2), 5 + 32 / 256),
        (NMInt8Config(n=4, m=8), 5.5 + 32 / 256),
        (NMInt4Config(n=2, group=64), 3.25),
        (NMInt4Config(n=3, group=128), 4.625),
        (NMConfig(n=4, m=8), (4 * 16 + 4 * 3) / 8),
        (NMInt4Config(n=4, m=8, group=64), (4 * 4 + 4 * 3) / 8 + 16 / 64),
        (NMInt4Config(n=1, m=8, group=128), (4 + 3) / 8 + 16 / 128),
        (UnstructuredConfig(density=0.25), 16 / 4 + 1),
        (UnstructuredInt8Config(density=0.5), 8 / 2 + 1 + 32 / 256),
        (UnstructuredInt4Config(density=0.5, group=64), 4 / 2 + 1 + 16 / 64),
    ],
    ids=str,
)
def test_bits_a_weight_by_hand(format, bits: float) -> None:
    assert bits_per_weight(format.pack(draw((2, 256, 3)))) == bits


@pytest.mark.parametrize("format", PACKED, ids=str)
def test_packing_what_was_unpacked_changes_nothing(format) -> None:
    once = format.pack(draw((3, 128, 5), "float16"))
    scale = getattr(once, "scale", None)
    if isinstance(once, Int4Offset):
        scale = jnp.concatenate([once.scale, once.minimum], axis=-1)
    again = format.pack(once.dense()) if scale is None else format.pack(once.dense(), scale=scale)
    np.testing.assert_array_equal(again.dense(), once.dense())


@pytest.mark.parametrize("format", PACKED, ids=str)
def test_a_stack_is_its_layers(format) -> None:
    w = draw((3, 128, 5))
    together = format.pack(w)
    for layer in range(3):
        one = jax.tree.map(lambda leaf: leaf[layer], together)  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, one, format.pack(w[layer]))
        np.testing.assert_array_equal(one.dense(), together.dense()[layer])


@pytest.mark.parametrize("format", PACKED, ids=str)
def test_packs_under_jit_to_the_same_value(format) -> None:
    w = draw((128, 5))
    jitted = jax.jit(format.pack)(w)
    assert jax.tree.structure(jitted) == jax.tree.structure(format.pack(w))
    np.testing.assert_allclose(jitted.dense(), format.pack(w).dense(), rtol=1e-6)


@pytest.mark.parametrize("format", PACKED, ids=str)
def test_a_weight_of_zeros_stays_zero(format) -> None:
    dense = format.pack(jnp.zeros((128, 3))).dense()
    np.testing.assert_array_equal(dense, np.zeros((128, 3)))


@pytest.mark.parametrize("format", PACKED, ids=str)
@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e30])
def test_extreme_magnitudes_stay_finite(format, size: float) -> None:
    w = draw((128, 3)) * jnp.float32(size)
    if isinstance(format, Int4OffsetConfig) and size > 65504:
        with pytest.raises(InputError, match="int4_offset stores scales and minima as float16, at most 65504"):
            format.pack(w)
        return
    dense = np.asarray(format.pack(w).dense())
    assert np.isfinite(dense).all()
    if size >= 1e-30:
        assert np.linalg.norm(dense / size - w / size) < 0.75 * np.linalg.norm(w / size)


@pytest.mark.parametrize("format", [format for format in PACKED if block_of(format) > 1], ids=str)
def test_what_does_not_divide_is_refused_with_both_numbers(format) -> None:
    block = block_of(format)
    size = block + block // 2
    with pytest.raises(InputError) as error:
        format.pack(draw((2, size, 4)))
    assert f"multiple of {block};" in str(error.value)
    assert f"(2, {size}, 4) has {size}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_dense_weight_is_its_own_dense() -> None:
    w = draw((4, 4))
    assert to_dense(w) is w


@pytest.mark.parametrize("format", FORMATS[:9], ids=repr)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_is_refused(format, value):
    """Where its numbers are known; while a program is traced they are not."""
    w = draw((block_of(format), 3)).at[0, 2].set(value)
    with pytest.raises(InputError, match=rf"^the weight holds {value} at \[0, 2\], and it must be finite \(1 of"):
        format.pack(w)
    jax.eval_shape(format.pack, w)


@pytest.mark.parametrize("format", [f for f in PACKED if not hasattr(f, "dtype")], ids=repr)
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5])
def test_a_scale_that_is_none_is_refused(format, value):
    w = draw((128, 3))
    scale = jnp.ones(format.pack(w).scale.shape, jnp.float32).at[0, 1].set(value)
    if isinstance(format, Int4OffsetConfig):  # minima follow
        scale = jnp.concatenate([scale, jnp.zeros_like(scale)], axis=-1)
    if value < 0 and type(format.pack(w)).signed_scale:
        held = np.asarray(format.pack(w, scale=scale).dense())
        assert (held[:, 1][held[:, 1] != 0] * np.asarray(w)[:, 1][held[:, 1] != 0] > 0).all() and held[:, 1].any()
        return
    with pytest.raises(InputError, match=rf"^the scale holds {value} at \[0, 1\], and it must be finite"):
        format.pack(w, scale=scale)
    jax.eval_shape(lambda scale: format.pack(w, scale=scale), scale)


def test_a_weight_beyond_the_stored_precision_is_refused():
    """The largest float32 is infinite in bfloat16."""
    largest = jnp.full((2, 2), jnp.finfo(jnp.float32).max)
    with pytest.raises(InputError, match="the weight holds inf"):
        DenseConfig(dtype="bfloat16").pack(largest)
    assert (DenseConfig(dtype="float32").pack(largest) == largest).all()
