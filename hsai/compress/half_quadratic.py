"""Scales without data that hold the many closely and let the few go: HQQ (Badri and Shaji, "Half-quadratic quantization
of large machine learning models", 2023).

The search of `hsai.compress.grid` makes the squared error small, to which a few outliers contribute most. Here it is
the sum of |w - v|^p with p below one, whose minimum has many small errors and some large ones, as is right for weights
with heavy tails. It is split in two (half-quadratic splitting): errors u that are meant to be there are set apart by
the norm's own shrinkage, u = sign(e) max(|e| - |e|^(p - 1) / beta, 0), and the scale is fitted to what is left by least
squares, s = <q, w - u> / <q, q>, with the levels q that weights had; then weights are rounded anew.

The authors keep the scale and move a zero point z, to the mean of q - (w - u) / s over the group. Where levels count
from a minimum m = -z s it moves so too, m = mean(w - u - s q), and the scale with it, s being the slope of w - u over
q: of student-t weights (3 degrees of freedom, groups of 32) the minimum alone takes 0.9 % off the sum of |w - v|^0.7
that the search leaves, both 1.6 %. Where levels count from zero there is only the scale to move.
Errors are shrunk in units of the scale, so that it does not matter how large weights are.

D contraction, F outputs, G positions that share a scale.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from hsai.compress.grid import Grid
from hsai.errors import InputError
from hsai.formats.packed import invert_scale

STRENGTH, GROWTH = 3.0, 1.01
"""beta, and by what it grows each time: at first an error above half a step's third is meant to be there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfQuadraticConfig:
    """Each weight by itself: as the nearest solver, with scales, and minima where a format has them, that suit most
    weights of a group, not its outliers."""

    kind: Literal["half_quadratic"] = "half_quadratic"
    """Names this solver in files."""

    norm: float = 0.7
    """p."""

    iterations: int = 20
    """Times that weights are rounded anew."""

    def __post_init__(self) -> None:
        if not 0 < self.norm < 1:
            raise InputError(f"solver norm={self.norm:g} must be above 0 and below 1")
        if self.iterations < 1:
            raise InputError(f"solver iterations={self.iterations} must be at least 1")


def refine_scale(w: jax.Array, scale: jax.Array, grid: Grid, config: HalfQuadraticConfig) -> jax.Array:
    """The best scale (..., 1, F) of those that the iteration meets, as it is stored, by the sum of |w - v|^p; or scale
    and minimum (..., 1, 2 F), where the grid has minima.

    Args:
      w: float32 (..., G, F), groups that share a scale.
      scale: (..., 1, F) or (..., 1, 2 F), where to begin.
      grid: where values lie.
      config: p, and for how long.
    """

    def measure(scale: jax.Array) -> jax.Array:
        return jnp.sum(jnp.abs(w - grid.round(w, scale)) ** config.norm, axis=-2, keepdims=True)

    def step(
        state: tuple[jax.Array, jax.Array, jax.Array], strength: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        found, best, least = state
        held = grid.round(w, found)
        scale, start = jnp.split(found, 2, axis=-1) if grid.has_minimum else (found, 0.0)
        inverse = invert_scale(scale)
        level, size = (held - start) * inverse, jnp.abs((w - held) * inverse)
        shrunk = size - jnp.where(size > 0, size, 1.0) ** (config.norm - 1.0) / strength
        meant = jnp.sign(w - held) * jnp.maximum(shrunk, 0.0) * jnp.abs(scale)
        found = _fit(level, w - meant, scale, grid)
        error = measure(found)
        # By their bits: the product of two small scales is zero, whatever their signs.
        turned = (jnp.signbit(found) != jnp.signbit(first))[..., : w.shape[-1]]
        better = (error < least) & ~turned
        kept = jnp.tile(better, 2) if grid.has_minimum else better
        return (found, jnp.where(kept, found, best), jnp.where(better, error, least)), None

    first = scale.astype(jnp.float32)
    strengths = STRENGTH * GROWTH ** jnp.arange(config.iterations, dtype=jnp.float32)
    (_, best, _), _ = jax.lax.scan(step, (first, first, measure(first)), strengths)
    return best.astype(grid.dtype)


def _fit(level: jax.Array, target: jax.Array, scale: jax.Array, grid: Grid) -> jax.Array:
    """The scale (..., 1, F), and behind it the minimum where the grid has one, with which the levels (..., G, F) come
    closest to the target (..., G, F), float32 as they are stored; where all levels are the same `scale` stays."""
    middle = jnp.mean(level, axis=-2, keepdims=True) if grid.has_minimum else 0.0
    aside = level - middle
    squares = jnp.sum(jnp.square(aside), axis=-2, keepdims=True)
    slope = jnp.sum(aside * target, axis=-2, keepdims=True) / jnp.where(squares > 0, squares, 1.0)
    scale = jnp.where(squares > 0, slope, scale).astype(grid.dtype).astype(jnp.float32)
    if not grid.has_minimum:
        return scale
    # Of what the scale leaves as it is stored, so that the minimum makes up for its rounding.
    minimum = jnp.mean(target - scale * level, axis=-2, keepdims=True).astype(grid.dtype).astype(jnp.float32)
    return jnp.concatenate([scale, minimum], axis=-1)
