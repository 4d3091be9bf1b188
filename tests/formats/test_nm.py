"""NM and NMInt4: exactly n of every m stay, the largest ones, where they stood; zeros, ties and negatives included."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsai.errors import InputError
from hsai.formats import NMConfig, NMInt4Config, NMInt8Config, nm_mask
from hsai.formats.nm import PATTERNS, select_kept

SEEDS = st.integers(0, 2**32 - 1)
PATTERN = st.sampled_from(PATTERNS)


def keep_largest(w: np.ndarray, n: int, m: int) -> np.ndarray:
    """The mask by a plain loop; of equal magnitudes the earlier stays."""
    mask = np.zeros(w.shape, bool)
    for f in range(w.shape[1]):
        for start in range(0, w.shape[0], m):
            order = sorted(range(start, start + m), key=lambda d: (-abs(w[d, f]), d))
            mask[order[:n], f] = True
    return mask


@settings(deadline=None, max_examples=12)
@given(seed=SEEDS, pattern=PATTERN, ties=st.booleans())
def test_the_mask_is_that_of_a_plain_loop(seed: int, pattern: tuple[int, int], ties: bool) -> None:
    rng = np.random.default_rng(seed)
    w = rng.integers(-2, 3, (64, 3)).astype(np.float32) if ties else rng.normal(size=(64, 3)).astype(np.float32)
    np.testing.assert_array_equal(nm_mask(jnp.asarray(w), *pattern), keep_largest(w, *pattern))


@settings(deadline=None, max_examples=12)
@given(
    seed=SEEDS,
    pattern=PATTERN,
    kept=st.integers(0, 4),
    stack=st.sampled_from([(), (2,)]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_what_is_sparse_enough_comes_back_exactly(
    seed: int, pattern: tuple[int, int], kept: int, stack, dtype: str
) -> None:
    rng = np.random.default_rng(seed)
    n, m = pattern
    order = rng.random((*stack, 256 // m, m, 5)).argsort(-2)
    w = np.where(order < min(n, kept), rng.integers(-100, 101, order.shape), 0)  # small integers are bfloat16s
    w = w.reshape(*stack, 256, 5).astype(np.float32)
    packed = NMConfig(n=n, m=m, dtype=dtype).pack(jnp.asarray(w))
    np.testing.assert_array_equal(packed.dense(), w)
    assert packed.values.dtype == dtype


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, pattern=PATTERN)
def test_dense_is_the_masked_weight(seed: int, pattern: tuple[int, int]) -> None:
    n, m = pattern
    w = np.random.default_rng(seed).normal(size=(256, 4)).astype(np.float32)
    dense = NMConfig(n=n, m=m, dtype="float32").pack(jnp.asarray(w)).dense()
    np.testing.assert_array_equal(dense, np.where(keep_largest(w, n, m), w, 0))


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, pattern=PATTERN)
def test_the_mask_is_that_of_a_stable_sort(seed: int, pattern: tuple[int, int]) -> None:
    """Few distinct magnitudes, so that most groups have ties; stacked layers in front."""
    w = np.random.default_rng(seed).integers(-2, 3, (2, 16, 3)).astype(np.float32)
    n, m = pattern
    groups = np.abs(w.reshape(2, 16 // m, m, 3))
    order = np.argsort(-groups, axis=2, kind="stable")
    wanted = np.zeros(groups.shape, bool)
    np.put_along_axis(wanted, order[:, :, :n], True, axis=2)
    np.testing.assert_array_equal(nm_mask(jnp.asarray(w), n, m), wanted.reshape(w.shape))


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, pattern=PATTERN, group=st.sampled_from([32, 64, 128]))
def test_int4_codes_of_sparse_weights_come_back_exactly(seed: int, pattern: tuple[int, int], group: int) -> None:
    rng = np.random.default_rng(seed)
    n, m = pattern
    groups = (256 // m, m, 3)
    codes = np.where(rng.random(groups).argsort(1) < n, rng.integers(-8, 8, groups), 0).reshape(256, 3)
    scale = 2.0 ** rng.integers(-9, 3, (256 // group, 3)).astype(np.float32)
    w = (codes * np.repeat(scale, group, axis=0)).astype(np.float32)
    packed = NMInt4Config(n=n, m=m, group=group).pack(jnp.asarray(w), scale=jnp.asarray(scale))
    np.testing.assert_array_equal(packed.dense(), w)


@settings(deadline=None, max_examples=10)
@given(seed=SEEDS, pattern=PATTERN)
def test_the_default_int4_scale_is_that_of_the_kept_weights(seed: int, pattern: tuple[int, int]) -> None:
    n, m = pattern
    w = np.random.default_rng(seed).normal(size=(256, 4)).astype(np.float32)
    mask = keep_largest(w, n, m)
    packed = NMInt4Config(n=n, m=m, group=64).pack(jnp.asarray(w))
    scale = np.asarray(packed.scale.astype(jnp.float32))
    np.testing.assert_allclose(scale, np.abs(w * mask).reshape(4, 64, 4).max(1) / 7, rtol=2**-8)
    step = np.repeat(scale, 64, axis=0)
    dense = np.asarray(packed.dense())
    assert (dense[~mask] == 0).all()
    assert (np.abs(dense - w)[mask] <= (0.5001 * step)[mask]).all()


@pytest.mark.parametrize("m", [4, 8])
@pytest.mark.parametrize("kind", [functools.partial(NMConfig, dtype="float32"), NMInt4Config], ids=["nm", "nm_int4"])
def test_a_given_mask_decides_what_stays(kind, m: int) -> None:
    config = kind(n=m // 2, m=m)
    w = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    smallest = ~keep_largest(w, m // 2, m)
    dense = np.asarray(config.pack(jnp.asarray(w), jnp.asarray(smallest)).dense())
    assert (dense[~smallest] == 0).all() and np.linalg.norm(dense) > 0.8 * np.linalg.norm(w * smallest)


def test_positions_ascend_within_a_group_and_values_follow_them() -> None:
    w = jnp.asarray([[0.0], [-4.0], [1.0], [9.0], [3.0], [3.0], [3.0], [3.0]] * 4)
    values, positions = select_kept(w, nm_mask(w, 2, 4), 2, 4)
    assert values[:4, 0].tolist() == [-4.0, 9.0, 3.0, 3.0]
    assert positions[:4, 0].tolist() == [1, 3, 0, 1]


@pytest.mark.parametrize("config", [NMConfig, NMInt4Config, NMInt8Config])
@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (0, 8), (3, 8), (8, 8), (-1, 4), (1, 2), (2, 16)])
def test_patterns_that_there_are_not_are_refused(config, n: int, m: int) -> None:
    with pytest.raises(
        InputError, match=f"sparsity {n}:{m} is not supported; valid are 1:4, 2:4, 3:4, 1:8, 2:8 and 4:8"
    ):
        config(n=n, m=m)
