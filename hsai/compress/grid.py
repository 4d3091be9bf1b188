"""The values that a format can hold: a grid of even levels times a scale a group, from zero or from a minimum of the
group, or any float at kept positions.

Solvers work on this description and not on packed arrays, so that one solver serves every format.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hsai.formats import (
    FormatConfig,
    Int2Config,
    Int3Config,
    Int4Config,
    Int4OffsetConfig,
    Int8Config,
    OutliersConfig,
    SparseConfig,
    TernaryConfig,
)
from hsai.formats.packed import invert_scale
from hsai.formats.sparse import ByteValues, CodeValues
from hsai.formats.vnm import VNMPattern


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Levels low, low + 1, ... high, each times the scale of its group."""

    low: float
    """Smallest level: an integer, or a half if zero lies between two levels."""

    high: float
    """Largest level."""

    group: int | None
    """Positions along the contraction that share a scale; None: all of an output."""

    dtype: str
    """In which scales are stored."""

    has_minimum: bool = False
    """Whether levels count from a minimum of the group, stored like its scale. Wherever scales (..., F) are handed on,
    they then are (..., 2 F): those of all outputs, and behind them their minima."""

    def count_scales(self, outputs: int) -> int:
        """How many numbers a group of each of so many outputs has in all."""
        return 2 * outputs if self.has_minimum else outputs

    @property
    def is_signed(self) -> bool:
        """Whether scales may be negative: with a level more below zero than above, so that the largest magnitude of a
        group, of whichever sign, can be on it."""
        return not self.has_minimum and -self.low > self.high

    @property
    def ratios(self) -> np.ndarray:
        """Shares of the largest magnitude of a group that its outermost level may stand for, the largest first: with
        few levels the best is far below (of normal weights about 0.3 for three levels, 0.85 for sixteen). Of signed
        scales it may stand for more, at most so much that the largest magnitude is one level further in: that holds
        what is symmetric."""
        least = 0.5 if self.high >= 7 else 0.1
        if not self.is_signed:
            return np.linspace(1.0, least, round((1 - least) / 0.02) + 1, dtype=np.float32)
        beyond = np.linspace(-self.low / self.high, 1.0, 6, endpoint=False, dtype=np.float32)
        return np.concatenate([beyond, np.linspace(1.0, least, round((1 - least) / 0.024) + 1, dtype=np.float32)])

    def round(self, w: jax.Array, scale: jax.Array) -> jax.Array:
        """The nearest value of the grid, float32; `scale` broadcasts against w, but for the minima in it."""
        wide = scale.astype(jnp.float32)
        if self.has_minimum:
            wide, minimum = jnp.split(wide, 2, axis=-1)
            return jnp.clip(jnp.round((w - minimum) * invert_scale(wide)), self.low, self.high) * wide + minimum
        half = self.low % 1.0
        return jnp.clip(jnp.round(w * invert_scale(wide) - half) + half, self.low, self.high) * wide


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pattern:
    """Of every m positions along the contraction n are kept; with v, out of 4 that v neighbouring outputs share."""

    n: int
    m: int
    v: int | None = None


def grid_of(format: FormatConfig | CodeValues) -> Grid | None:
    """Where the values of a format lie, but for those that it keeps apart; None where they are floats."""
    match format:
        case Int8Config() | ByteValues():
            return Grid(low=-127, high=127, group=None, dtype="float32")
        case Int4Config() | CodeValues():
            return Grid(low=-8, high=7, group=format.group, dtype="bfloat16")
        case Int4OffsetConfig():
            return Grid(low=0, high=15, group=format.group, dtype="float16", has_minimum=True)
        case Int3Config():
            return Grid(low=-3.5, high=3.5, group=format.group, dtype="bfloat16")
        case Int2Config():
            return Grid(low=-1.5, high=1.5, group=format.group, dtype="bfloat16")
        case TernaryConfig():
            return Grid(low=-1, high=1, group=format.group, dtype="bfloat16")
        case OutliersConfig():
            return grid_of(format.base)
        case _:
            return None


def pattern_of(format: FormatConfig) -> Pattern | None:
    """What a format keeps; None where it keeps everything."""
    if isinstance(format, OutliersConfig):
        return pattern_of(format.base)
    if not isinstance(format, SparseConfig):
        return None
    n, m = format.counts
    return Pattern(n=n, m=m, v=format.v if isinstance(format, VNMPattern) else None)


def search_scale(w: jax.Array, importance: jax.Array | float, grid: Grid) -> jax.Array:
    """The scale with the least squared error of each output, as it is stored: (..., G, F) -> (..., 1, F), or, where
    the grid has minima, (..., 1, 2 F) by `_search_span`.

    NaN where none has a finite error: a group of numbers too large to be squared, or for what stores their scale.

    The grid's ratios of the largest magnitude are tried in their order, as they will be stored; the first wins a tie.
    One after the other, so that the search needs the memory of a few copies of w, however many there are. Of a grid
    with signed scales (`Grid.is_signed`) the largest magnitude goes to the side of the lowest level, as in ggml's Q4_0:
    of normal and Student-t weights that takes a tenth off the squared error that positive scales leave, and trying both
    signs would take no more (`tests/compress/test_plain.py`).

    Args:
      w: float32, groups of G positions that share a scale.
      importance: of each position's error, (G, 1) or a number.
      grid: where values lie.
    """
    if grid.has_minimum:
        return _search_span(w, importance, grid)
    if grid.is_signed:
        most, least = jnp.max(w, axis=-2, keepdims=True), jnp.min(w, axis=-2, keepdims=True)
        largest = jnp.where(most > -least, most, least) / grid.low
    else:
        largest = jnp.max(jnp.abs(w), axis=-2, keepdims=True) / grid.high

    def try_ratio(best: tuple[jax.Array, jax.Array], ratio: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        scale = (largest * ratio).astype(grid.dtype).astype(jnp.float32)
        error = jnp.sum(importance * jnp.square(w - grid.round(w, scale)), axis=-2, keepdims=True)
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(better, scale, best[1])), None

    start = (jnp.full(largest.shape, jnp.inf, jnp.float32), jnp.full(largest.shape, jnp.nan, jnp.float32))
    (_, scale), _ = jax.lax.scan(try_ratio, start, jnp.asarray(grid.ratios))
    return scale.astype(grid.dtype)


PARTS = np.asarray(
    [(1.0, 0.0), *((share, at * (1 - share)) for share in np.linspace(1, 0.7, 13)[1:] for at in (0, 0.5, 1))],
    np.float32,
)
"""Of the span of a group: what the levels from a minimum may cover, and how far from its smallest weight they begin."""


def _search_span(w: jax.Array, importance: jax.Array | float, grid: Grid) -> jax.Array:
    """Scale and minimum with the least squared error: (..., G, F) -> (..., 1, 2 F), as they are stored.

    First the levels reach from the smallest weight to the largest, which holds what lies on such levels; then they
    cover parts of that, at its begin, its middle and its end. The first wins a tie. Of normal weights in groups of 32
    that takes 8 % off the error norm; fitting a line to the codes, as ggml does, takes 7 %.
    """
    low, high = jnp.min(w, axis=-2, keepdims=True), jnp.max(w, axis=-2, keepdims=True)

    def try_part(best: tuple[jax.Array, jax.Array], part: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        # Rounded before it is added, so that no compiler makes one operation of both: every program finds the same.
        begin = (part[1] * (high - low)).astype(grid.dtype).astype(jnp.float32)
        found = jnp.concatenate([part[0] * (high - low) / grid.high, low + begin], axis=-1).astype(grid.dtype)
        error = jnp.sum(importance * jnp.square(w - grid.round(w, found)), axis=-2, keepdims=True)
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(jnp.tile(better, 2), found, best[1])), None

    none = jnp.full((*low.shape[:-1], 2 * low.shape[-1]), jnp.nan, grid.dtype)
    start = (jnp.full(low.shape, jnp.inf, jnp.float32), none)
    (_, found), _ = jax.lax.scan(try_part, start, jnp.asarray(PARTS))
    return found
