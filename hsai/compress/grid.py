"""The values that a format can hold: a grid of even levels times a scale a group, or any float at kept positions.

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
    Int8Config,
    NMConfig,
    NMInt4Config,
    NMInt8Config,
    TernaryConfig,
    VNMConfig,
    VNMInt4Config,
)
from hsai.formats.packed import invert_scale


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

    @property
    def ratios(self) -> np.ndarray:
        """Shares of the largest magnitude of a group that its largest level may stand for, 1 first: with few levels the
        best is far below (of normal weights about 0.3 for three levels, 0.85 for sixteen)."""
        least = 0.5 if self.high >= 7 else 0.1
        return np.linspace(1.0, least, round((1 - least) / 0.02) + 1, dtype=np.float32)

    def round(self, w: jax.Array, scale: jax.Array) -> jax.Array:
        """The nearest value of the grid, float32; `scale` broadcasts against w."""
        wide = scale.astype(jnp.float32)
        half = self.low % 1.0
        return jnp.clip(jnp.round(w * invert_scale(wide) - half) + half, self.low, self.high) * wide


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pattern:
    """Of every m positions along the contraction n are kept; with v, out of 4 that v neighbouring outputs share."""

    n: int
    m: int
    v: int | None = None


def grid_of(format: FormatConfig) -> Grid | None:
    """Where the values of a format lie; None where they are floats."""
    match format:
        case Int8Config() | NMInt8Config():
            return Grid(low=-127, high=127, group=None, dtype="float32")
        case Int4Config() | NMInt4Config() | VNMInt4Config():
            return Grid(low=-8, high=7, group=format.group, dtype="bfloat16")
        case Int3Config():
            return Grid(low=-3.5, high=3.5, group=format.group, dtype="bfloat16")
        case Int2Config():
            return Grid(low=-1.5, high=1.5, group=format.group, dtype="bfloat16")
        case TernaryConfig():
            return Grid(low=-1, high=1, group=format.group, dtype="bfloat16")
        case _:
            return None


def pattern_of(format: FormatConfig) -> Pattern | None:
    """What a format keeps; None where it keeps everything."""
    match format:
        case NMConfig() | NMInt8Config() | NMInt4Config():
            return Pattern(n=format.n, m=format.m)
        case VNMConfig() | VNMInt4Config():
            return Pattern(n=format.n, m=format.m, v=format.v)
        case _:
            return None


def search_scale(w: jax.Array, importance: jax.Array | float, grid: Grid) -> jax.Array:
    """The scale with the least squared error of each output, as it is stored: (..., G, F) -> (..., 1, F).

    The grid's ratios of the largest magnitude are tried from 1 downwards, as they will be stored; the first wins a tie.
    One after the other, so that the search needs the memory of a few copies of w, however many there are.

    Args:
      w: float32, groups of G positions that share a scale.
      importance: of each position's error, (G, 1) or a number.
      grid: where values lie.
    """
    largest = jnp.max(jnp.abs(w), axis=-2, keepdims=True) / grid.high

    def try_ratio(best: tuple[jax.Array, jax.Array], ratio: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        scale = (largest * ratio).astype(grid.dtype).astype(jnp.float32)
        error = jnp.sum(importance * jnp.square(w - grid.round(w, scale)), axis=-2, keepdims=True)
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(better, scale, best[1])), None

    start = (jnp.full(largest.shape, jnp.inf, jnp.float32), jnp.zeros(largest.shape, jnp.float32))
    (_, scale), _ = jax.lax.scan(try_ratio, start, jnp.asarray(grid.ratios))
    return scale.astype(grid.dtype)
