"""Rounding and pruning with error feedback: GPTQ (2210.17323), SparseGPT (2301.00774), and both decided together.

What is lost at position i of the contraction is made up for by the positions behind it, in the least-squares sense of
the activations that calibration saw. With U of `hsai.compress.factor`, an error e_i = (w_i - v_i) / U_ii costs e_i^2 of
the squared output error, and the rows behind i become w_j - U_ij e_i. So the loss of a whole weight is the sum of all
e_i^2, and everything that is chosen on the way (scales, masks) is chosen to keep that sum small:

  - a scale is searched among shares of the largest weight, errors weighted by 1 / U_ii^2;
  - a mask N:M is searched among all binomial(M, N) of a group, each tried with its rounding and its feedback within the
    group: that is the joint solve. Where there are too many, or where V outputs share a choice, positions are ranked by
    what pruning costs beyond rounding, (w^2 - (w - v)^2) / U_ii^2. A group too large to be solved in one piece has its
    mask ranked at its start, as SparseGPT ranks 128 positions at a time.

1 / U_ii^2 is what the activation at i has that those behind it do not tell. The last positions have nobody to make up
for them and count in full, so another order than the natural one may serve better: that of falling activations, the
"act-order" of 2210.17323's authors (in their code `desc_act`, with `static_groups`).

Positions that a format keeps apart (`hsai.formats.outliers`) are in no group's scale and need no place in a mask; they
make up for errors before them like others, and leave next to none.

D contraction, F outputs, G positions of a scale group, M positions of a sparsity group, B positions of a lazy block.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from hsai.compress.grid import Grid, Pattern, search_scale
from hsai.formats.nm import nm_mask
from hsai.formats.vnm import CHOSEN
from hsai.sharding import constrain

BLOCK = 128
"""Positions whose errors reach the rows behind them in one product (2210.17323, step 2)."""

MOST_MASKS = 70
"""Masks of a group that are all tried: those of 4:8."""

MOST_SPAN = 16
"""Positions of a sparsity group that is solved in one piece, in a program that is as long as their pairs are many."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solved:
    """values (D, F) float32 that the format holds exactly; mask bool (D, F), all true without a pattern; scale
    (D / G, F) or (1, F), None without a grid; loss: the sum of e^2 over all positions and outputs, float32 ()."""

    values: jax.Array
    mask: jax.Array
    scale: jax.Array | None
    loss: jax.Array


@functools.partial(jax.jit, static_argnames=("grid", "pattern"))
def solve(
    w: jax.Array,
    upper: jax.Array,
    *,
    grid: Grid | None,
    pattern: Pattern | None,
    mask: jax.Array | None = None,
    order: jax.Array | None = None,
    apart: jax.Array | None = None,
) -> Solved:
    """Chooses values, scales and mask of one weight.

    Args:
      w: (D, F) float32.
      upper: U (D, D) float32, of `factorize`.
      grid: where values lie; None keeps floats.
      pattern: what is kept; None keeps all.
      mask: bool (D, F) that fits the pattern, to be taken as it is; None chooses one.
      order: int32 (D,) of `order_positions`, in which positions are solved; `upper` is then that of the Gram matrix in
        this order. Scales, whose groups are then solved piece by piece, are searched beforehand, on the weight as it
        was. None goes from the first position to the last, and searches a group's scale when it gets there.
      apart: bool (D,), positions that are kept in bfloat16, wherever `order` puts them; None has none.
    Returns: what a format's `pack` takes.
    """
    # No output needs another one: on a mesh each device solves its share of them.
    w = constrain(w.astype(jnp.float32), None, "columns")
    apart = jnp.zeros(w.shape[0], bool) if apart is None else apart
    rest = _leave_out(w, apart)
    if order is None:
        fixed = None
        if grid is not None and grid.group is None:
            fixed = _search_scales(rest, _weigh(upper, apart), grid, pattern, mask)
        spread = None if fixed is None else _spread(fixed, w)
        values, kept, scales, loss = _solve(w, upper, apart, grid, pattern, mask, spread)
        return Solved(values, kept, scales if fixed is None else fixed, loss)
    back = jnp.argsort(order)
    fixed = None if grid is None else _search_scales(rest, _weigh(upper, apart[order])[back], grid, pattern, mask)
    spread, given = (None if fixed is None else _spread(fixed, w)[order]), (None if mask is None else mask[order])
    values, kept, _, loss = _solve(w[order], upper, apart[order], grid, pattern, given, spread)
    return Solved(values[back], kept[back], fixed, loss)


def order_positions(gram: jax.Array, pattern: Pattern | None) -> jax.Array:
    """The positions int32 (D,) in the order of falling activations; groups of a pattern stay whole, the one with the
    largest sum first."""
    span = pattern.m if pattern is not None else 1
    squares = jnp.sum(jnp.diagonal(gram).reshape(-1, span), axis=-1)
    first = jnp.argsort(-squares, stable=True) * span
    return (first[:, None] + jnp.arange(span)).reshape(-1)


def _leave_out(w: jax.Array, apart: jax.Array) -> jax.Array:
    """w (D, F) with zeros at what is kept apart, which no scale has to reach."""
    return jnp.where(apart[:, None], 0.0, w)


def _weigh(upper: jax.Array, apart: jax.Array) -> jax.Array:
    """What an error costs at each position, float32 (D, 1); nothing where it is kept apart."""
    return jnp.where(apart, 0.0, jnp.square(1.0 / jnp.diagonal(upper)))[:, None]


def _search_scales(
    w: jax.Array, importance: jax.Array, grid: Grid, pattern: Pattern | None, mask: jax.Array | None
) -> jax.Array:
    """The scales (D / G, F), or (D / G, 2 F) with minima, of all groups of w (D, F), as they are stored, before
    anything is made up for."""
    if pattern is not None:
        w = jnp.where(_rank(w, w, importance, pattern) if mask is None else mask, w, 0.0)
    size, outputs = w.shape
    group = grid.group or size
    return search_scale(w.reshape(-1, group, outputs), importance.reshape(-1, group, 1), grid)[:, 0]


def _spread(scale: jax.Array, w: jax.Array) -> jax.Array:
    """The scale of each position, float32 (D, F), or (D, 2 F) with minima."""
    return jnp.repeat(scale.astype(jnp.float32), w.shape[0] // scale.shape[0], axis=0)


def _solve(
    w: jax.Array,
    upper: jax.Array,
    apart: jax.Array,
    grid: Grid | None,
    pattern: Pattern | None,
    mask: jax.Array | None,
    fixed: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """values (D, F), mask (D, F), the scales (D / G, F) that were searched, and the loss; `fixed` (D, F) are scales to
    be taken as they are."""
    size, outputs = w.shape
    group = grid.group if grid is not None and grid.group is not None and fixed is None else 1
    unit = math.lcm(group, pattern.m if pattern is not None else 1)
    block = -(-min(BLOCK, size) // unit) * unit
    padded = -size % block
    # Positions that are not there: no weight, and no part in the feedback.
    rows = ((0, padded), (0, 0))
    w = jnp.pad(w, rows)
    apart = jnp.pad(apart, (0, padded))
    given, fixed = (None if x is None else jnp.pad(x, rows) for x in (mask, fixed))
    upper = jnp.pad(upper, ((0, padded), (0, padded))) + jnp.diag(
        jnp.pad(jnp.zeros(size), (0, padded), constant_values=1)
    )

    def step(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w, values, kept, scales, loss = state
        start = index * block
        rows = jax.lax.dynamic_slice_in_dim(w, start, block)
        factor = jax.lax.dynamic_slice(upper, (start, start), (block, block))
        part, known = (None if x is None else jax.lax.dynamic_slice_in_dim(x, start, block) for x in (given, fixed))
        alone = jax.lax.dynamic_slice_in_dim(apart, start, block)
        rounded, mask, scale, errors = _solve_block(rows, factor, alone, part, known, grid, pattern, group, unit)
        behind = jax.lax.dynamic_slice_in_dim(upper, start, block) * (jnp.arange(w.shape[0]) >= start + block)
        w = w - jnp.matmul(behind.T, errors, precision=jax.lax.Precision.HIGHEST)
        values = jax.lax.dynamic_update_slice_in_dim(values, rounded, start, 0)
        kept = jax.lax.dynamic_update_slice_in_dim(kept, mask, start, 0)
        scales = jax.lax.dynamic_update_slice_in_dim(scales, scale, start // group, 0)
        return w, values, kept, scales, loss + jnp.sum(jnp.square(errors))

    width = outputs if grid is None else grid.count_scales(outputs)
    shapes = (jnp.zeros_like(w), jnp.ones(w.shape, bool), jnp.zeros((w.shape[0] // group, width), jnp.float32))
    _, values, kept, scales, loss = jax.lax.fori_loop(
        0, w.shape[0] // block, step, (w, *shapes, jnp.zeros((), jnp.float32))
    )
    searched = None if grid is None or fixed is not None else scales[: size // group].astype(grid.dtype)
    return values[:size], kept[:size], searched, loss


def _solve_block(
    w: jax.Array,
    upper: jax.Array,
    apart: jax.Array,
    given: jax.Array | None,
    fixed: jax.Array | None,
    grid: Grid | None,
    pattern: Pattern | None,
    group: int,
    unit: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """values (B, F), mask (B, F), scales (B / G, F) float32, errors (B, F) of one lazy block."""
    span = pattern.m if pattern is not None and pattern.m <= MOST_SPAN else 1
    ranked = pattern is not None and span < pattern.m and given is None
    importance = _weigh(upper, apart)

    def cut(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size)

    def step(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w, values, kept, scales, errors = state
        start = index * span
        first = start // group * group
        if pattern is not None and ranked:

            def rank() -> jax.Array:
                rows, weight = _leave_out(cut(w, start, unit), cut(apart, start, unit)), cut(importance, start, unit)
                known = None if fixed is None else cut(fixed, start, unit)
                mask = _rank_roughly(rows, weight, known, grid, pattern)
                return jax.lax.dynamic_update_slice_in_dim(kept, mask, start, 0)

            kept = jax.lax.cond(start % unit == 0, rank, lambda: kept)
        if grid is not None and fixed is None:

            def search() -> jax.Array:
                part = cut(kept, first, group) if ranked or given is not None else None
                rows, weight = _leave_out(cut(w, first, group), cut(apart, first, group)), cut(importance, first, group)
                return _search_scales(rows, weight, grid, pattern, part).astype(jnp.float32)

            old = cut(scales, first // group, 1)
            scale = jax.lax.cond(start == first, search, lambda: old)
            scales = jax.lax.dynamic_update_slice_in_dim(scales, scale, first // group, 0)
            scale = jnp.broadcast_to(scale, (span, scale.shape[1]))
        else:
            scale = jnp.zeros((span, 1)) if fixed is None else cut(fixed, start, span)
        rows, alone = cut(w, start, span), cut(apart, start, span)
        factor = jax.lax.dynamic_slice(upper, (start, start), (span, span))
        mask = None
        if pattern is not None:
            if given is None and not ranked:
                mask = _choose(rows, factor, scale, alone, grid, pattern)
                kept = jax.lax.dynamic_update_slice_in_dim(kept, mask, start, 0)
            mask = cut(kept, start, span)
        rounded, missed = _feed_back(rows, factor, scale, alone, grid, mask)
        behind = cut(upper, start, span) * (jnp.arange(w.shape[0]) >= start + span)
        w = w - jnp.matmul(behind.T, missed, precision=jax.lax.Precision.HIGHEST)
        values = jax.lax.dynamic_update_slice_in_dim(values, rounded, start, 0)
        errors = jax.lax.dynamic_update_slice_in_dim(errors, missed, start, 0)
        return w, values, kept, scales, errors

    width = w.shape[1] if grid is None else grid.count_scales(w.shape[1])
    zeros, scales = jnp.zeros_like(w), jnp.zeros((w.shape[0] // group, width), jnp.float32)
    state = (w, zeros, jnp.ones(w.shape, bool) if given is None else given, scales, zeros)
    _, values, kept, scales, errors = jax.lax.fori_loop(0, w.shape[0] // span, step, state)
    return values, kept, scales, errors


def _feed_back(
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


def _choose(
    w: jax.Array, upper: jax.Array, scale: jax.Array, apart: jax.Array, grid: Grid | None, pattern: Pattern
) -> jax.Array:
    """The mask (M, F) of a group: the best of all, or the best ranked."""
    if pattern.v is not None or math.comb(pattern.m, pattern.n) > MOST_MASKS:
        rounded = w if grid is None else grid.round(w, scale)
        return _rank(w, rounded, _weigh(upper, apart), pattern)
    kept = itertools.combinations(range(pattern.m), pattern.n)
    masks = np.array([[i in chosen for i in range(pattern.m)] for chosen in kept])
    tried = jnp.broadcast_to(masks[:, :, None], (*masks.shape, w.shape[1]))
    _, errors = _feed_back(jnp.broadcast_to(w, tried.shape), upper, scale, apart, grid, tried)
    best = jnp.argmin(jnp.sum(jnp.square(errors), axis=1), axis=0)
    return jnp.asarray(masks)[best].T


def _rank_roughly(
    w: jax.Array, importance: jax.Array, scale: jax.Array | None, grid: Grid | None, pattern: Pattern
) -> jax.Array:
    """The mask of whole groups (.., F) before anything of them is solved; scales (.., F) that are not known yet are
    those of the weight as it is."""
    if grid is None:
        return _rank(w, w, importance, pattern)
    if scale is None:
        scale = _spread(_search_scales(w, importance, grid, pattern, None), w)
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
