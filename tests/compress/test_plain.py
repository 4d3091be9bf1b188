"""Searched scales: never worse than the plain one, exact where the plain one is, and found layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsai.compress.grid import Grid, grid_of
from hsai.compress.grid import search_scale as search_grid
from hsai.compress.held import find_scale
from hsai.compress.names import name_format
from hsai.compress.plain import pack_weight
from hsai.formats import (
    Int2Config,
    Int3Config,
    Int4Config,
    Int4OffsetConfig,
    Int8Config,
    NMConfig,
    NMInt4Config,
    NMInt8Config,
    TernaryConfig,
    nm_mask,
)
from hsai.formats.codes import group_absmax

GROUP = 32
CODES = [Int4Config(group=GROUP), Int3Config(group=GROUP), Int2Config(group=GROUP)]


def group_errors(w: np.ndarray, dense: jax.Array) -> np.ndarray:
    """Squared error of each group (D / GROUP, F), float64."""
    missed = np.asarray(w, np.float64) - np.asarray(dense, np.float64)
    return np.square(missed).reshape(-1, GROUP, w.shape[-1]).sum(1)


def draw(seed: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = {"normal": rng.normal, "heavy": lambda size: rng.standard_t(2, size)}[kind](size=(96, 5))
    return (w * 10.0 ** rng.integers(-4, 3)).astype(np.float32)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["normal", "heavy"]), config=st.sampled_from(CODES))
def test_no_group_is_rounded_worse_than_by_any_share_of_its_largest(seed: int, kind: str, config) -> None:
    w, grid = draw(seed, kind), grid_of(config)
    found = group_errors(w, pack_weight(jnp.asarray(w), config).dense())
    plain = group_absmax(jnp.asarray(w), GROUP) / grid.high
    if grid.is_signed:  # the lowest level for the largest magnitude, whatever its sign
        groups = w.reshape(-1, GROUP, w.shape[-1])
        largest = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)[:, 0]
        plain = jnp.asarray(largest / grid.low)
    for ratio in grid.ratios[::5]:
        tried = group_errors(w, config.pack(jnp.asarray(w), plain * ratio).dense())
        assert (found <= tried * (1 + 1e-5)).all()


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["normal", "heavy"]))
def test_no_group_is_rounded_worse_than_by_its_span(seed: int, kind: str) -> None:
    w, config = jnp.asarray(draw(seed, kind)), Int4OffsetConfig(group=GROUP)
    found, plain = (group_errors(np.asarray(w), value.dense()) for value in (pack_weight(w, config), config.pack(w)))
    assert (found <= plain * (1 + 1e-5)).all() and found.sum() < 0.97 * plain.sum()


@pytest.mark.parametrize("make", [Int4Config, Int4OffsetConfig])
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_the_search_is_worth_its_while(kind: str, make) -> None:
    w, config = draw(0, kind), make(group=GROUP)
    plain, found = (group_errors(w, value.dense()).sum() for value in (config.pack(w), pack_weight(w, config)))
    assert 0.05 < 1 - found / plain < 0.35


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_a_sign_of_scales_is_worth_a_tenth(kind: str) -> None:
    """Of the squared error that positive ones leave, though a group tries one sign alone; both would take no more."""
    grid, rng = Grid(low=-8, high=7, group=GROUP, dtype="bfloat16"), np.random.default_rng(0)
    drawn = {"normal": rng.normal, "heavy": lambda size: rng.standard_t(5, size)}[kind](size=(100, GROUP, 50))
    groups = jnp.asarray(drawn, jnp.float32)
    absolute = jnp.max(jnp.abs(groups), axis=1, keepdims=True) / grid.high

    def miss(scale: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(groups - grid.round(groups, scale.astype(jnp.bfloat16))), axis=1)

    shares = np.linspace(1, 0.5, 26, dtype=np.float32)
    positive, negative = (
        jnp.min(jnp.stack([miss(sign * absolute * share) for share in shares]), axis=0) for sign in (1, -1)
    )
    scale = search_grid(groups, 1.0, grid)
    found = miss(scale)
    assert (scale < 0).any() and (scale > 0).any()
    assert found.sum() < 0.93 * positive.sum()
    assert found.sum() < 1.01 * jnp.minimum(positive, negative).sum()


def test_centered_levels_are_what_the_formats_say_they_are_for() -> None:
    """Of normal weights the errors of Max's table, which groups of 64 with scales of their own go below."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((1024, 64)), jnp.float32)

    def miss(dense: jax.Array) -> float:
        return float(jnp.linalg.norm(w - dense) / jnp.linalg.norm(w))

    groups = w.reshape(-1, 64, 64)
    for config, low, table, worse in ((Int2Config(group=64), -2, 0.345, 1.1), (Int3Config(group=64), -4, 0.194, 1.03)):
        centered = miss(pack_weight(w, config).dense())
        assert 0.93 * table < centered < table
        lopsided = Grid(low=low, high=-low - 1, group=64, dtype="bfloat16")
        largest = jnp.max(jnp.abs(groups), axis=1, keepdims=True) / lopsided.high
        errors = [
            jnp.sum(jnp.square(groups - lopsided.round(groups, share * largest)), axis=1)
            for share in np.linspace(1, 0.1, 46)
        ]
        rounded = float(jnp.sqrt(jnp.sum(jnp.min(jnp.stack(errors), axis=0)) / jnp.sum(jnp.square(groups))))
        assert rounded > worse * centered  # with scales of one sign
    assert miss(TernaryConfig(group=64).pack(w).dense()) > 1.25 * centered


@pytest.mark.parametrize(("least", "largest"), [(-7, 7), (-7, -7), (-8, -8), (-7, 8)])
def test_representable_weights_stay_exact(least: int, largest: int) -> None:
    """Be they symmetric, or with a level more on either side."""
    rng = np.random.default_rng(0)
    codes = rng.integers(least, max(largest, 7) + 1, (128, 4)).astype(np.float32)
    codes[::GROUP] = largest
    w = codes * np.repeat(2.0 ** rng.integers(-9, 2, (4, 4)), GROUP, axis=0).astype(np.float32)
    np.testing.assert_array_equal(pack_weight(jnp.asarray(w), Int4Config(group=GROUP)).dense(), w)


@pytest.mark.parametrize("config", CODES, ids=lambda c: c.format)
def test_groups_of_zeros_have_scale_zero(config) -> None:
    assert not find_scale(jnp.zeros((64, 3)), config).any()
    assert not pack_weight(jnp.zeros((64, 3)), config).dense().any()


@pytest.mark.parametrize(
    "config",
    [
        Int8Config(),
        Int4Config(group=GROUP),
        Int4OffsetConfig(group=GROUP),
        Int3Config(group=GROUP),
        Int2Config(group=GROUP),
        TernaryConfig(group=GROUP),
        NMConfig(n=2),
        NMInt8Config(n=2),
        NMInt4Config(n=2, group=GROUP),
    ],
    ids=name_format,
)
def test_a_stack_is_packed_layer_by_layer(config) -> None:
    w = jnp.stack([jnp.asarray(draw(seed, "heavy")[:64]) for seed in range(3)])
    together = pack_weight(w, config)
    assert together.shape == w.shape
    for layer in range(3):
        alone = pack_weight(w[layer], config)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf: leaf[layer], together), alone)  # noqa: B023


def test_pruning_keeps_the_largest_and_scales_for_them_alone() -> None:
    w = jnp.asarray(draw(1, "normal"))
    w = w[:64]
    mask = nm_mask(w, 2, 4)
    np.testing.assert_array_equal(pack_weight(w, NMConfig(dtype="float32")).dense(), jnp.where(mask, w, 0))
    packed = pack_weight(w, NMInt4Config(group=GROUP))
    np.testing.assert_array_equal(packed.scale, find_scale(w, NMInt4Config(group=GROUP), mask))
    kept = np.asarray(jnp.where(mask, w, 0))
    plain = NMInt4Config(group=GROUP).pack(w).dense()
    assert (group_errors(kept, packed.dense()) <= group_errors(kept, plain) * (1 + 1e-5)).all()
