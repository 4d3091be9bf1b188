"""Unstructured sparsity: a share of every block stays, the largest, wherever they stand; the bits say where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsai.errors import InputError
from hsai.formats import (
    NMConfig,
    UnstructuredConfig,
    UnstructuredInt4Config,
    UnstructuredInt8Config,
    bits_per_weight,
    project,
)
from hsai.sharding import MeshConfig, make_mesh, use_mesh
from hsai_kernels import densify_bits

SEEDS = st.integers(0, 2**32 - 1)
BLOCKS = st.sampled_from([32, 64, 128])
KINDS = [UnstructuredConfig, UnstructuredInt8Config, UnstructuredInt4Config]


def keep_largest(w: np.ndarray, n: int, m: int) -> np.ndarray:
    """The mask by a plain loop; of equal magnitudes the earlier stays."""
    mask = np.zeros(w.shape, bool)
    for f in range(w.shape[1]):
        for start in range(0, w.shape[0], m):
            order = sorted(range(start, start + m), key=lambda d: (-abs(w[d, f]), d))
            mask[order[:n], f] = True
    return mask


@settings(deadline=None, max_examples=8)
@given(seed=SEEDS, block=BLOCKS, share=st.integers(1, 31), ties=st.booleans())
def test_the_largest_stay_where_they_stood(seed: int, block: int, share: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    w = rng.integers(-2, 3, (256, 3)) if ties else rng.normal(size=(256, 3))
    w = w.astype(np.float32)
    config = UnstructuredConfig(density=share / 32, block=block, dtype="float32")  # type: ignore[arg-type]
    packed = config.pack(jnp.asarray(w))
    mask = keep_largest(w, share * block // 32, block)
    np.testing.assert_array_equal(config.mask(jnp.asarray(w)), mask)
    np.testing.assert_array_equal(packed.kept(), mask)
    np.testing.assert_array_equal(packed.dense(), np.where(mask, w, 0))
    assert packed.shape == w.shape and bits_per_weight(packed) == config.invariant_bits(256) == 32 * share / 32 + 1


def test_a_free_choice_of_half_keeps_more_of_the_norm() -> None:
    """Of normal weights, as docs/compression.md has it: what 9 bits a weight, and 9.5 of 4:8, leave out."""
    w = jax.random.normal(jax.random.key(0), (4096, 32))
    for config, wanted in ((UnstructuredConfig(), 0.27), (NMConfig(n=4, m=8), 0.32), (NMConfig(n=2, m=4), 0.36)):
        left = jnp.where(config.mask(w), 0.0, w)
        assert float(jnp.linalg.norm(left) / jnp.linalg.norm(w)) == pytest.approx(wanted, abs=0.006)
    assert UnstructuredConfig().invariant_bits(4096) == NMConfig(n=2, m=4).invariant_bits(4096) == 9
    assert NMConfig(n=4, m=8).invariant_bits(4096) == 9.5


def test_a_bit_a_position_by_hand() -> None:
    """Two blocks of 32 of one output: the definition, spelled out."""
    w = np.zeros((64, 1), np.float32)
    w[[3, 31, 32, 40], 0] = [5.0, -6.0, 7.0, 8.0]
    packed = UnstructuredConfig(density=1 / 16, block=32).pack(jnp.asarray(w))
    assert packed.bits.tolist() == [[1 << 3 | 1 << 31], [1 << 0 | 1 << 8]]
    assert packed.values.astype(jnp.float32).tolist() == [[5.0], [-6.0], [7.0], [8.0]]
    assert (packed.n, packed.m) == (2, 32)


@settings(deadline=None, max_examples=6)
@given(seed=SEEDS, block=BLOCKS, eighths=st.integers(1, 3), group=st.sampled_from([32, 64, 128]))
def test_integers_are_off_by_half_a_step(seed: int, block: int, eighths: int, group: int) -> None:
    w = np.random.default_rng(seed).normal(size=(2, 256, 5)).astype(np.float32)
    density = eighths / 4
    mask = np.stack([keep_largest(layer, int(density * block), block) for layer in w])
    for config, step in (
        (UnstructuredInt8Config(density=density, block=block), 256),  # type: ignore[arg-type]
        (UnstructuredInt4Config(density=density, block=block, group=group), group),  # type: ignore[arg-type]
    ):
        packed = config.pack(jnp.asarray(w))
        dense, scale = np.asarray(packed.dense()), np.repeat(np.asarray(packed.scale, np.float32), step, axis=-2)
        assert (dense[~mask] == 0).all()
        assert (np.abs(dense - w)[mask] <= ((0.5001 + 2.0**-8 * 7) * scale)[mask]).all()
        assert bits_per_weight(packed) == config.invariant_bits(256)


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_mask_decides_what_stays(kind: type) -> None:
    w = np.random.default_rng(0).normal(size=(128, 4)).astype(np.float32)
    smallest = ~keep_largest(w, 64, 128)
    packed = kind(block=128).pack(jnp.asarray(w), jnp.asarray(smallest))
    np.testing.assert_array_equal(packed.kept(), smallest)
    dense = np.asarray(packed.dense())
    assert (dense[~smallest] == 0).all() and np.linalg.norm(dense) > 0.8 * np.linalg.norm(w * smallest)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_are_taken(kind: type) -> None:
    packed, ids = kind().pack(jax.random.normal(jax.random.key(0), (128, 16))), jnp.asarray([15, 0, 7, 7])
    np.testing.assert_array_equal(packed.take(ids).dense(), packed.dense()[:, ids])


def test_a_mesh_cuts_between_blocks() -> None:
    """Three blocks for two devices: their words would divide, and each half of a block would be read as another's."""
    w = UnstructuredConfig(density=0.5, block=64, dtype="float32").pack(jax.random.normal(jax.random.key(0), (192, 8)))
    x = jax.random.normal(jax.random.key(1), (4, 192))
    wanted = np.asarray(x, np.float64) @ np.asarray(w.dense(), np.float64)
    for model in (2, 4):
        with use_mesh(make_mesh(MeshConfig(data=1, fsdp=1, model=model), jax.devices()[:model])):
            found = jax.jit(lambda x, w: project(x, w, out_axes=("batch", "embed"), in_axis="mlp"))(x, w)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UnstructuredConfig(density=0.0), r"density=0 of blocks of 64 keeps 0 of each; valid are .* 0.015625 "),
        (lambda: UnstructuredConfig(density=1.0), "keeps 64 of each"),
        (lambda: UnstructuredConfig(density=0.3), "density=0.3 of blocks of 64 keeps 19.2 of each"),
        (lambda: UnstructuredInt4Config(density=0.0625), "keeps 4 of each; valid are multiples of 0.125 above 0"),
    ],
)
def test_shares_that_cannot_be(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
    assert UnstructuredInt4Config(density=0.0625, block=128).counts == (8, 128)


@pytest.mark.parametrize(
    ("kept", "bits", "n", "m", "size"),
    [
        ((32, 4), (2, 4), 32, 64, 96),  # a length that blocks do not divide
        ((31, 4), (2, 4), 32, 64, 64),  # too few
        ((32, 4), (1, 4), 32, 64, 64),  # half of the bits
        ((32, 4), (2, 3), 32, 64, 64),  # of fewer columns
        ((8, 4), (2, 4), 2, 16, 64),  # blocks within a word
    ],
)
def test_arrays_that_do_not_fit_are_refused(kept, bits, n: int, m: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"do not make {n}:{m} of {size}"):
        densify_bits(jnp.zeros(kept), jnp.zeros(bits, jnp.uint32), n=n, m=m, size=size)
