"""What is decided within a group of positions: its scales, its mask, and what each position passes on to the next.

What is chosen keeps the sum of e_i^2 small (`hsai.compress.solver` tells what e_i and U are):

  - a scale is searched among shares of the largest weight, errors weighted by 1 / U_ii^2;
  - a mask N:M is searched among all binomial(M, N) of a group, each tried with its rounding and its feedback within the
    group: that is the joint solve. Where there are too many, or where V outputs share a choice, positions are ranked by
    what pruning costs beyond rounding, (w^2 - (w - v)^2) / U_ii^2. A group too large to be solved in one piece has its
    mask ranked at its start, as SparseGPT ranks 128 positions at a time.

1 / U_ii^2 is what the activation at i has that those behind it do not tell.

D contraction, F outputs, G positions of a scale group, M positions of a sparsity group.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from hsai.compress.grid import Grid, Pattern, search_scale
from hsai.formats.nm import nm_mask
from hsai.formats.vnm import CHOSEN

MOST_MASKS = 70
"""Masks of a group that are all tried: those of 4:8."""


def leave_out(w: jax.Array, apart: jax.Array) -> jax.Array:
    """w (D, F) with zeros at what is kept apart, which no scale has to reach."""
    return jnp.where(apart[:, None], 0.0, w)


def weigh_positions(upper: jax.Array, apart: jax.Array) -> jax.Array:
    """What an error costs at each position, float32 (D, 1); nothing where it is kept apart."""
    return jnp.where(apart, 0.0, jnp.square(1.0 / jnp.diagonal(upper)))[:, None]


def search_scales(
    w: jax.Array, importance: jax.Array, grid: Grid, pattern: Pattern | None, mask: jax.Array | None
) -> jax.Array:
    """The scales (D / G, F), or (D / G, 2 F) with minima, of all groups of w (D, F), as they are stored, before
    anything is made up for."""
    if pattern is not None:
        w = jnp.where(_rank(w, w, importance, pattern) if mask is None else mask, w, 0.0)
    size, outputs = w.shape
    group = grid.group or size
    return search_scale(w.reshape(-1, group, outputs), importance.reshape(-1, group, 1), grid)[:, 0]


def spread_scales(scale: jax.Array, w: jax.Array) -> jax.Array:
    """The scale of each position, float32 (D, F), or (D, 2 F) with minima."""
    return jnp.repeat(scale.astype(jnp.float32), w.shape[0] // scale.shape[0], axis=0)


def feed_back(
    w: jax.Array, upper: jax.Array, scale: jax.Array, apart: jax.Array, grid: Grid | None, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """values and errors (..., M, F) of a group, one position after the other; `scale` is (M, F), `apart` (M,), `mask`
    (..., M, F) or None keeps all."""
    rows = [w[..., i, :] for i in range(w.shape[-2])]
    values, errors = [], []
    for i, row in enumerate(rows):
        value = row if grid is None else grid.round(row, scale[i])
        # What the format holds of a zero, where it has no level there, stays below what is kept apart.
        under = jnp.zeros_like(row) if grid is None else grid.round(jnp.zeros_like(row), scale[i])
        if mask is not None:
            value = jnp.where(mask[..., i, :], value, 0.0)
        value = jnp.where(apart[i], under + (row - under).astype(jnp.bfloat16).astype(jnp.float32), value)
        error = (row - value) / upper[i, i]
        for j in range(i + 1, len(rows)):
            rows[j] = rows[j] - upper[i, j] * error
        values.append(value)
        errors.append(error)
    return jnp.stack(values, axis=-2), jnp.stack(errors, axis=-2)


def choose_mask(
    w: jax.Array, upper: jax.Array, scale: jax.Array, apart: jax.Array, grid: Grid | None, pattern: Pattern
) -> jax.Array:
    """The mask (M, F) of a group: the best of all, or the best ranked."""
    if pattern.v is not None or math.comb(pattern.m, pattern.n) > MOST_MASKS:
        rounded = w if grid is None else grid.round(w, scale)
        return _rank(w, rounded, weigh_positions(upper, apart), pattern)
    kept = itertools.combinations(range(pattern.m), pattern.n)
    masks = np.array([[i in chosen for i in range(pattern.m)] for chosen in kept])
    tried = jnp.broadcast_to(masks[:, :, None], (*masks.shape, w.shape[1]))
    _, errors = feed_back(jnp.broadcast_to(w, tried.shape), upper, scale, apart, grid, tried)
    best = jnp.argmin(jnp.sum(jnp.square(errors), axis=1), axis=0)
    return jnp.asarray(masks)[best].T


def rank_roughly(
    w: jax.Array, importance: jax.Array, scale: jax.Array | None, grid: Grid | None, pattern: Pattern
) -> jax.Array:
    """The mask of whole groups (.., F) before anything of them is solved; scales (.., F) that are not known yet are
    those of the weight as it is."""
    if grid is None:
        return _rank(w, w, importance, pattern)
    if scale is None:
        scale = spread_scales(search_scales(w, importance, grid, pattern, None), w)
    return _rank(w, grid.round(w, scale), importance, pattern)


def _rank(w: jax.Array, rounded: jax.Array, importance: jax.Array, pattern: Pattern) -> jax.Array:
    """The mask (.., F) that keeps what pruning would cost most beyond rounding, group by group of m positions."""
    cost = importance * (jnp.square(w) - jnp.square(w - rounded))
    cost = jnp.maximum(cost, 0.0)  # a clipped weight may be nearer to zero than to its level
    if pattern.v is None:
        return nm_mask(cost, pattern.n, pattern.m)
    size, outputs = cost.shape
    shared = jnp.sum(cost.reshape(size, outputs // pattern.v, pattern.v), axis=-1)
    chosen = jnp.repeat(nm_mask(shared, CHOSEN, pattern.m), pattern.v, axis=-1)
    # Among the chosen the n largest; the others rank below any of them, even below what costs nothing.
    return nm_mask(jnp.where(chosen, jnp.maximum(cost, jnp.finfo(jnp.float32).tiny), 0.0), pattern.n, pattern.m)
