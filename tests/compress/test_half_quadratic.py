"""HQQ's iteration against a plain loop in float64, on heavy and light tails; and what formats then hold."""

import jax.numpy as jnp
import numpy as np
import pytest

from hsai.compress import RecipeConfig, Rule, compress
from hsai.compress.grid import Grid, grid_of, search_scale
from hsai.compress.half_quadratic import HalfQuadraticConfig, pack_half_quadratic, refine_scale
from hsai.compress.one_shot import pack_weight
from hsai.configuration import from_dict, to_dict
from hsai.errors import InputError
from hsai.formats import (
    DenseConfig,
    Int2Config,
    Int3Config,
    Int4Config,
    Int4OffsetConfig,
    Int8Config,
    NMConfig,
    NMInt4Config,
    NMInt8Config,
    OutliersConfig,
    TernaryConfig,
    is_packed_as,
    to_dense,
)
from tests.models.conftest import fill_model

CONFIG = HalfQuadraticConfig()


def draw(tails: str, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal(shape) if tails == "light" else rng.standard_t(3, shape)).astype(np.float32)


def round_plain(w: np.ndarray, scale: float, grid: Grid) -> np.ndarray:
    levels = np.arange(grid.low, grid.high + 1) * scale
    return levels[np.abs(w[:, None] - levels).argmin(axis=1)]


def refine_plain(w: np.ndarray, scale: float, grid: Grid, p: float, iterations: int) -> list[tuple[float, float]]:
    """(loss, scale) of where a group's iteration begins, and of each round."""
    w, met, strength = w.astype(np.float64), [], 3.0
    for _ in range(iterations + 1):
        held = round_plain(w, scale, grid)
        met.append((float(np.sum(np.abs(w - held) ** p)), scale))
        levels, steps = held / scale, (w - held) / scale
        size = np.where(steps == 0, 1, np.abs(steps))
        meant = np.sign(steps) * np.maximum(np.abs(steps) - size ** (p - 1) / strength, 0) * scale
        scale = float(jnp.asarray(levels @ (w - meant) / (levels @ levels), grid.dtype).astype(jnp.float32))
        strength *= 1.01
    return met


@pytest.mark.parametrize("tails", ["light", "heavy"])
@pytest.mark.parametrize("format", [Int4Config(group=32), Int2Config(group=32), TernaryConfig(group=64)])
def test_it_does_what_the_plain_loop_does(format, tails: str) -> None:
    """A rounding in float32 may turn a level, after which a group goes another way: few may."""
    grid = grid_of(format)
    assert grid is not None and grid.group is not None
    groups = draw(tails, 128, 12).reshape(-1, grid.group, 12)
    start = search_scale(jnp.asarray(groups), 1.0, grid)
    found = np.asarray(refine_scale(jnp.asarray(groups), start, grid, HalfQuadraticConfig(iterations=5)), np.float32)
    same, before, after = [], 0.0, 0.0
    for g in range(len(groups)):
        for f in range(12):
            met = refine_plain(groups[g, :, f], float(start[g, 0, f]), grid, 0.7, 5)
            same.append(found[g, 0, f] == min(met)[1])
            before += met[0][0]
            own = round_plain(groups[g, :, f].astype(np.float64), float(found[g, 0, f]), grid)
            loss = np.sum(np.abs(groups[g, :, f] - own) ** 0.7)
            assert loss <= met[0][0] * (1 + 1e-5), "never worse than where it began"
            after += loss
    assert np.mean(same) >= 0.9
    assert after < 0.996 * before


@pytest.mark.parametrize(
    "format",
    [
        Int8Config(),
        Int4Config(group=32),
        Int3Config(group=32),
        TernaryConfig(group=None),
        NMInt8Config(n=2, m=4),
        NMInt4Config(n=2, m=4, group=32),
        OutliersConfig(base=Int4Config(group=32), share=0.05),
    ],
    ids=lambda format: format.format,
)
def test_formats_hold_most_weights_more_closely(format) -> None:
    w = jnp.asarray(draw("heavy", 128, 16))
    plain, found = pack_weight(w, format), pack_weight(w, format, CONFIG)
    assert is_packed_as(found, format)
    kept = np.asarray(to_dense(plain)) != 0 if hasattr(format, "mask") else np.ones(w.shape, bool)
    losses = [np.sum(np.abs(np.asarray(w - to_dense(value)))[kept] ** 0.7) for value in (plain, found)]
    assert losses[1] < 0.995 * losses[0], losses
    if hasattr(format, "mask"):  # the mask is that of magnitudes in either case
        np.testing.assert_array_equal(found.kept(), format.mask(w))


def test_zero_groups_and_stacks() -> None:
    w = jnp.asarray(draw("heavy", 2, 64, 8)).at[0, :32].set(0.0)
    packed = pack_weight(w, Int4Config(group=32), CONFIG)
    assert not np.asarray(packed.dense()[0, :32]).any() and bool(jnp.all(jnp.isfinite(packed.scale)))
    alone = pack_half_quadratic(w[1], Int4Config(group=32), CONFIG)
    np.testing.assert_array_equal(packed.dense()[1], alone.dense())


def test_a_recipe_asks_for_it() -> None:
    model = fill_model()
    rule = Rule(pattern="*", format=Int4Config(group=32), solver=CONFIG)
    packed, _ = compress(model, RecipeConfig(rules=(Rule(pattern="layers.mlp.down", format=Int8Config()), rule)))
    wanted = pack_weight(model.layers.mlp.up.get_value(), Int4Config(group=32), CONFIG)
    np.testing.assert_array_equal(packed.layers.mlp.up.get_value().words, wanted.words)
    assert from_dict(Rule, to_dict(rule)) == rule
    for wrong in ({"norm": 0.0}, {"norm": 1.0}, {"iterations": 0}):
        with pytest.raises(InputError, match="solver (norm|iterations)="):
            HalfQuadraticConfig(**wrong)
    for format in (DenseConfig(), (DenseConfig(), NMConfig())):
        with pytest.raises(InputError, match="has no scales, and the half-quadratic solver finds nothing else"):
            Rule(pattern="*", format=format, solver=CONFIG)
    with pytest.raises(
        InputError, match="'\\*': the half-quadratic solver moves scales, and int4_offset g32 has minima"
    ):
        Rule(pattern="*", format=(Int4Config(), Int4OffsetConfig()), solver=CONFIG)
