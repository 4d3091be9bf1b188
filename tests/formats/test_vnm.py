"""VNM and its integers: 4 of every m positions a block of outputs, n of those an output; what is kept comes back."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsai.errors import InputError
from hsai.formats import VNMConfig, VNMInt4Config, VNMInt8Config, bits_per_weight, vnm_mask

SEEDS = st.integers(0, 2**32 - 1)
V = st.sampled_from([1, 2, 8])
N = st.sampled_from([1, 2, 3])
M = st.sampled_from([8, 16, 32])


def keep_largest(w: np.ndarray, v: int, n: int, m: int) -> np.ndarray:
    """The mask by plain loops; of equal sums and magnitudes the earlier stays."""
    mask = np.zeros(w.shape, bool)
    for block in range(0, w.shape[1], v):
        for start in range(0, w.shape[0], m):
            sums = np.abs(w[start : start + m, block : block + v]).sum(axis=1)
            chosen = sorted(range(m), key=lambda d: (-sums[d], d))[:4]
            for f in range(block, block + v):
                order = sorted(sorted(chosen), key=lambda d: (-abs(w[start + d, f]), d))
                mask[[start + d for d in order[:n]], f] = True
    return mask


def draw(seed: int, columns: int = 16) -> np.ndarray:
    """(512, columns) small integers as float32: many ties, and sums without rounding."""
    return np.random.default_rng(seed).integers(-9, 10, (512, columns)).astype(np.float32)


@settings(deadline=None, max_examples=12)
@given(seed=SEEDS, v=V, n=N, m=M)
def test_the_mask_is_that_of_plain_loops(seed: int, v: int, n: int, m: int) -> None:
    w = draw(seed)
    np.testing.assert_array_equal(vnm_mask(jnp.asarray(w), v, n, m), keep_largest(w, v, n, m))
    stacked = vnm_mask(jnp.stack([w, -w]), v, n, m)
    np.testing.assert_array_equal(stacked[0], stacked[1])


@settings(deadline=None, max_examples=12)
@given(seed=SEEDS, v=V, n=N, m=M, dtype=st.sampled_from(["float32", "bfloat16"]))
def test_what_is_kept_comes_back_exactly(seed: int, v: int, n: int, m: int, dtype: str) -> None:
    w = draw(seed)
    config = VNMConfig(v=v, n=n, m=m, dtype=dtype)
    packed = config.pack(jnp.asarray(w))
    np.testing.assert_array_equal(packed.dense(), np.where(keep_largest(w, v, n, m), w, 0))
    # What is sparse enough already loses nothing, with or without its mask.
    again = config.pack(packed.dense(), jnp.asarray(keep_largest(w, v, n, m)))
    np.testing.assert_array_equal(again.dense(), packed.dense())
    assert packed.shape == w.shape and packed.values.dtype == dtype
    assert bits_per_weight(packed) == config.invariant_bits(512)


@settings(deadline=None, max_examples=12)
@given(seed=SEEDS, v=V, n=N, m=M, group=st.sampled_from([32, 64, 128]))
def test_int4_keeps_the_same_weights_within_half_a_step(seed: int, v: int, n: int, m: int, group: int) -> None:
    w, config = draw(seed), VNMInt4Config(v=v, n=n, m=m, group=group)
    packed = config.pack(jnp.asarray(w))
    mask = keep_largest(w, v, n, m)
    dense = np.asarray(packed.dense())
    step = np.repeat(np.asarray(packed.scale, np.float32), group, axis=0)
    assert (dense[~mask] == 0).all()
    assert (np.abs(dense - w)[mask] <= (0.5001 * step + 2.0**-8 * 7 * step)[mask]).all()
    assert bits_per_weight(packed) == config.invariant_bits(512)


@settings(deadline=None, max_examples=6)
@given(seed=SEEDS, v=V, n=N, m=M)
def test_int8_keeps_the_same_weights_within_half_a_step(seed: int, v: int, n: int, m: int) -> None:
    w, config = draw(seed), VNMInt8Config(v=v, n=n, m=m)  # type: ignore[arg-type]
    packed = config.pack(jnp.asarray(w))
    mask, dense = keep_largest(w, v, n, m), np.asarray(packed.dense())
    assert (dense[~mask] == 0).all()
    assert (np.abs(dense - w)[mask] <= np.broadcast_to(0.5001 * np.asarray(packed.scale), w.shape)[mask]).all()
    assert bits_per_weight(packed) == config.invariant_bits(512) == n / m * 10 + 1 / v + 32 / 512


def test_columns_that_are_taken_stand_alone() -> None:
    w = jnp.asarray(draw(0))
    ids = jnp.asarray([15, 0, 7, 7])
    for config in (VNMConfig(v=8, dtype="float32"), VNMInt4Config(v=8), VNMInt8Config(v=8)):
        packed = config.pack(w)
        np.testing.assert_array_equal(packed.take(ids).dense(), packed.dense()[:, ids])


@pytest.mark.parametrize("config", [VNMConfig, VNMInt4Config, VNMInt8Config])
@pytest.mark.parametrize(("v", "n", "m"), [(0, 2, 8), (64, 0, 8), (64, 4, 8), (64, 2, 4), (64, 2, 12), (64, 2, 64)])
def test_patterns_that_are_none_are_refused(config, v: int, n: int, m: int) -> None:
    with pytest.raises(InputError, match=f"sparsity {v}:{n}:{m} is not supported; valid are"):
        config(v=v, n=n, m=m)


@pytest.mark.parametrize("config", [VNMConfig, VNMInt4Config])
def test_shapes_that_do_not_divide_are_refused(config) -> None:
    with pytest.raises(InputError, match=r"multiple of 64; \(512, 65\) has 65"):
        config(v=64).pack(jnp.ones((512, 65)))
    with pytest.raises(InputError, match=r"64:2:8 sparsity.* needs a contraction that is a multiple of \d+; .* has 96"):
        config(v=64).pack(jnp.ones((96, 64)))
