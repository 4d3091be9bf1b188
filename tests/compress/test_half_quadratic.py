"""HQQ's iteration against a plain loop in float64, on heavy and light tails; and what formats then hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.compress import RecipeConfig, Rule, compress, half_quadratic
from hsai.compress.grid import Grid, grid_of, search_scale
from hsai.compress.half_quadratic import HalfQuadraticConfig, refine_scale
from hsai.compress.names import name_format
from hsai.compress.plain import pack_weight
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


def round_plain(w: np.ndarray, numbers: list[float], grid: Grid) -> np.ndarray:
    """With a group's numbers: its scale, and its minimum if it has one."""
    levels = np.arange(grid.low, grid.high + 1) * numbers[0] + sum(numbers[1:])
    return levels[np.abs(w[:, None] - levels).argmin(axis=1)]


def refine_plain(
    w: np.ndarray, numbers: list[float], grid: Grid, p: float, iterations: int
) -> list[tuple[float, list[float]]]:
    """(loss, numbers) of where a group's iteration begins, and of each round."""

    def store(number: float) -> float:
        return float(jnp.asarray(number, grid.dtype).astype(jnp.float32))

    w, met, strength = w.astype(np.float64), [], 3.0
    for _ in range(iterations + 1):
        held = round_plain(w, numbers, grid)
        met.append((float(np.sum(np.abs(w - held) ** p)), numbers))
        scale, *minimum = numbers
        levels, steps = (held - sum(minimum)) / scale, (w - held) / scale
        size = np.where(steps == 0, 1, np.abs(steps))
        rest = w - np.sign(steps) * np.maximum(np.abs(steps) - size ** (p - 1) / strength, 0) * scale
        if not minimum:
            numbers = [store(levels @ rest / (levels @ levels))]
        else:
            scale = store(np.polyfit(levels, rest, 1)[0])
            numbers = [scale, store(np.mean(rest - scale * levels))]
        strength *= 1.01
    return met


def read_numbers(found: jax.Array, g: int, f: int, outputs: int) -> list[float]:
    """Of one group of (groups, 1, F) or (groups, 1, 2 F)."""
    return np.asarray(found, np.float32)[g, 0, f::outputs].tolist()


@pytest.mark.parametrize("tails", ["light", "heavy"])
@pytest.mark.parametrize(
    "format", [Int4Config(group=32), Int4OffsetConfig(group=32), Int2Config(group=32), TernaryConfig(group=64)]
)
def test_it_does_what_the_plain_loop_does(format, tails: str) -> None:
    """A rounding in float32 may turn a level, after which a group goes another way: few may."""
    grid = grid_of(format)
    assert grid is not None and grid.group is not None
    groups = draw(tails, 128, 12).reshape(-1, grid.group, 12)
    start = search_scale(jnp.asarray(groups), 1.0, grid)
    found = refine_scale(jnp.asarray(groups), start, grid, HalfQuadraticConfig(iterations=5))
    same, before, after = [], 0.0, 0.0
    for g in range(len(groups)):
        for f in range(12):
            met = refine_plain(groups[g, :, f], read_numbers(start, g, f, 12), grid, 0.7, 5)
            same.append(read_numbers(found, g, f, 12) == min(met)[1])
            before += met[0][0]
            own = round_plain(groups[g, :, f].astype(np.float64), read_numbers(found, g, f, 12), grid)
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
        Int4OffsetConfig(group=64),
        Int3Config(group=32),
        TernaryConfig(group=None),
        NMInt8Config(n=2, m=4),
        NMInt4Config(n=2, m=4, group=32),
        OutliersConfig(base=Int4Config(group=32), share=0.05),
        OutliersConfig(base=Int4OffsetConfig(group=32), share=0.05),
    ],
    ids=name_format,
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


@pytest.mark.parametrize("tails", ["light", "heavy"])
def test_one_round_of_scale_and_minimum(tails: str) -> None:
    """To the last bit of what is stored, but where float32 takes another level, or another of two equal sums."""
    format = Int4OffsetConfig(group=32)
    grid = grid_of(format)
    assert grid is not None
    groups = draw(tails, 96, 9).reshape(-1, 32, 9) + np.linspace(-2, 2, 9, dtype=np.float32)
    start = search_scale(jnp.asarray(groups), 1.0, grid)
    found = refine_scale(jnp.asarray(groups), start, grid, HalfQuadraticConfig(iterations=1))
    pairs = [
        (read_numbers(found, g, f, 9), min(refine_plain(groups[g, :, f], read_numbers(start, g, f, 9), grid, 0.7, 1)))
        for g in range(len(groups))
        for f in range(9)
    ]
    assert np.mean([own == wanted for own, (_, wanted) in pairs]) >= 0.96
    assert np.mean([own != read_numbers(start, i // 9, i % 9, 9) for i, (own, _) in enumerate(pairs)]) > 0.25


@pytest.mark.parametrize(
    ("size", "outputs", "group", "most"),
    [(1024, 64, 32, 0.987), (96, 7, 32, 0.985), (576, 5, 64, 0.995), (512, 24, 64, 0.99), (512, 9, 128, 0.97)],
)
def test_minima_move_too(size: int, outputs: int, group: int, most: float) -> None:
    """Of no group is the sum of |w - v|^0.7 larger than by the nearest solver, and of all together it is smaller."""
    w = draw("heavy", size, outputs)
    format = Int4OffsetConfig(group=group)  # type: ignore[arg-type]
    plain, found = (pack_weight(jnp.asarray(w), format, *solver) for solver in ((), (CONFIG,)))
    assert is_packed_as(found, format) and found.minimum.dtype == jnp.float16
    losses = [
        np.sum(np.abs(w - np.asarray(to_dense(v))).reshape(-1, group, outputs).astype(np.float64) ** 0.7, axis=1)
        for v in (plain, found)
    ]
    assert (losses[1] <= losses[0] * (1 + 1e-4)).all()
    assert losses[1].sum() < most * losses[0].sum(), losses[1].sum() / losses[0].sum()
    assert (np.asarray(found.minimum) != np.asarray(plain.minimum)).any()
    # What lies on 16 levels already stays there, whatever is tried.
    exact = np.asarray(to_dense(plain))
    np.testing.assert_array_equal(to_dense(pack_weight(jnp.asarray(exact), format, CONFIG)), exact)


@pytest.mark.parametrize("value", [0.0, 3.0, -60000.0, 1e-6])
def test_groups_of_one_number(value: float) -> None:
    """Without a span there is no scale, and the minimum is the number, as float16 has it."""
    packed = pack_weight(jnp.full((64, 3), value), Int4OffsetConfig(group=32), CONFIG)
    np.testing.assert_array_equal(to_dense(packed), np.float32(np.float16(value)))


@pytest.mark.parametrize("size", [1.0, 1e-22, 1e-35])
@pytest.mark.parametrize("format", [Int8Config(), Int3Config(group=32), Int2Config(group=32)])
def test_a_scale_keeps_its_sign_however_small(format, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels are symmetric, so that a negative scale holds a group as well, which readers then refuse."""
    fitted: list[int] = []

    def fit(level: jax.Array, target: jax.Array, scale: jax.Array, grid: Grid) -> jax.Array:
        fitted.append(1)
        return -real(level, target, jnp.abs(scale), grid)

    real = half_quadratic._fit
    w, grid = jnp.asarray(size * draw("heavy", 64, 8)), grid_of(format)
    assert grid is not None
    groups = w.reshape(-1, grid.group or 64, 8)
    start = search_scale(groups, 1.0, grid)
    better = refine_scale(groups, start, grid, HalfQuadraticConfig(iterations=1))
    assert bool((better != start).any()), "a fit with the right sign is taken"
    monkeypatch.setattr(half_quadratic, "_fit", fit)
    np.testing.assert_array_equal(refine_scale(groups, start, grid, HalfQuadraticConfig(iterations=1)), start)
    assert fitted and bool((start > 0).all())


def test_zero_groups_and_stacks() -> None:
    w = jnp.asarray(draw("heavy", 2, 64, 8)).at[0, :32].set(0.0)
    packed = pack_weight(w, Int4Config(group=32), CONFIG)
    assert not np.asarray(packed.dense()[0, :32]).any() and bool(jnp.all(jnp.isfinite(packed.scale)))
    alone = pack_weight(w[1], Int4Config(group=32), CONFIG)
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
    Rule(pattern="*", format=(Int4Config(), Int4OffsetConfig()), solver=CONFIG)
