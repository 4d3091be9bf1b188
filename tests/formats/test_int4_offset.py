"""Int4Offset against plain numpy, and against the blocks of GGUF's Q4_1, whose numbers it is to hold without error."""

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from hsai.compress.plain import pack_weight
from hsai.errors import InputError
from hsai.formats import Int4Config, Int4OffsetConfig
from hsai.interop.gguf_blocks import dequantize, quantize
from hsai_kernels import unpack_words

SEEDS = st.integers(0, 2**32 - 1)
GROUPS = st.sampled_from([32, 64, 128])


def join(scale: np.ndarray, minimum: np.ndarray) -> jnp.ndarray:
    """As `pack` takes them."""
    return jnp.concatenate([jnp.asarray(scale), jnp.asarray(minimum)], axis=-1)


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, stack=st.sampled_from([(), (3,)]), group=GROUPS)
def test_codes_are_held_exactly(seed: int, stack: tuple[int, ...], group: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (*stack, 256, 3))
    scale = 2.0 ** rng.integers(-9, 3, (*stack, 256 // group, 3))
    minimum = scale * rng.integers(-20, 20, scale.shape)
    w = (codes * np.repeat(scale, group, -2) + np.repeat(minimum, group, -2)).astype(np.float32)
    packed = Int4OffsetConfig(group=group).pack(jnp.asarray(w), join(scale, minimum))
    np.testing.assert_array_equal(unpack_words(packed.words, 4), codes)
    np.testing.assert_array_equal(packed.scale, scale.astype(np.float16))
    np.testing.assert_array_equal(packed.minimum, minimum.astype(np.float16))
    np.testing.assert_array_equal(packed.dense(), w)
    assert packed.shape == w.shape and packed.scale.dtype == packed.minimum.dtype == jnp.float16


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS)
def test_codes_are_those_of_the_nearest_levels(seed: int) -> None:
    """By the definition, all levels tried: also beyond the outer ones, and for numbers that are no float16."""
    rng = np.random.default_rng(seed)
    w = rng.standard_t(2, (64, 4)).astype(np.float32)
    packed = Int4OffsetConfig(group=32).pack(
        jnp.asarray(w), join(rng.uniform(0.05, 0.5, (2, 4)), rng.uniform(-3, 1, (2, 4)))
    )
    step, start = (np.repeat(np.asarray(part, np.float64), 32, 0) for part in (packed.scale, packed.minimum))
    levels = start + step * np.arange(16)[:, None, None]
    missed = np.abs(np.asarray(packed.dense(), np.float64) - w)
    np.testing.assert_allclose(missed, np.abs(levels - w).min(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pack", [Int4OffsetConfig.pack, lambda config, w: pack_weight(w, config)])
def test_a_group_on_one_side_of_zero_has_all_levels_where_it_is(pack) -> None:
    w = np.linspace(3.0, 4.5, 64, dtype=np.float32).reshape(2, 32, 1) - np.asarray([0, 20.0]).reshape(2, 1, 1)
    w = jnp.asarray(w.reshape(64, 1), jnp.float32)
    missed = np.abs(pack(Int4OffsetConfig(), w).dense() - w).max()
    # Half a step, and what rounding a minimum of 17 to float16 takes.
    assert missed <= 0.75 / 15 / 2 + 2**-7
    assert missed < 0.2 * np.abs(Int4Config(group=32).pack(w).dense() - w).max()


def draw_blocks(seed: int, kind: str) -> np.ndarray:
    """uint8: blocks of Q4_1 with 96 numbers for each of 5 outputs."""
    rng = np.random.default_rng(seed)
    if kind == "ggml":  # as ggml rounds what looks like weights
        rows = rng.standard_t(4, (5, 96)) * 10.0 ** rng.integers(-5, 2, (5, 1)) + rng.normal(size=(5, 1))
        return quantize(GGMLQuantizationType.Q4_1, rows)
    # Any scale and minimum, of which there are small ones without a full mantissa; codes that use both ends.
    blocks = rng.integers(0, 256, (15, 20), np.uint8)
    scale = rng.uniform(0.5, 1, 15) * 2.0 ** -rng.integers(4, 22, 15)
    start = rng.uniform(-24, 8, 15) * scale
    for at, numbers in ((0, scale), (2, start)):
        blocks[:, at : at + 2] = numbers.astype("<f2").view(np.uint8).reshape(15, 2)
    blocks[:, 4] = np.where(rng.random(15) < 0.5, 0x0F, 0xF0)
    return blocks.reshape(-1)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, kind=st.sampled_from(["ggml", "any"]))
def test_weights_from_q4_1_are_held_without_error(seed: int, kind: str) -> None:
    """Bit for bit, block by block, by the nearest solver: what a recipe does to a model that came from a GGUF file."""
    data = draw_blocks(seed, kind)
    w = dequantize(GGMLQuantizationType.Q4_1, data).reshape(5, 96).T
    packed = pack_weight(jnp.asarray(w), Int4OffsetConfig(group=32))
    np.testing.assert_array_equal(packed.dense(), w)
    blocks = data.reshape(5, 3, 20)
    for at, part in ((0, packed.scale), (2, packed.minimum)):
        np.testing.assert_array_equal(part, np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0].T)
    codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1).reshape(5, 96).T
    np.testing.assert_array_equal(unpack_words(packed.words, 4), codes)


def test_a_constant_group_has_no_scale() -> None:
    packed = pack_weight(jnp.full((64, 2), 0.75), Int4OffsetConfig(group=64))
    assert not packed.scale.any() and not packed.words.any()
    np.testing.assert_array_equal(packed.dense(), np.full((64, 2), 0.75))


def test_what_float16_cannot_say_is_refused() -> None:
    w = jnp.zeros((32, 2))
    with pytest.raises(InputError, match="as float16, at most 65504, and this weight needs 70000"):
        Int4OffsetConfig().pack(w.at[3, 1].set(-70000.0))
    with pytest.raises(InputError, match=r"the scale holds -1 at \[0, 0\], and it must be finite and at least 0"):
        Int4OffsetConfig().pack(w, join(-np.ones((1, 2)), np.zeros((1, 2))))
    with pytest.raises(InputError, match=r"int4_offset with groups of 64 needs a contraction that is a multiple of 64"):
        Int4OffsetConfig(group=64).pack(w)
