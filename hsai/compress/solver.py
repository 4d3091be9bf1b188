"""Rounding and pruning with error feedback: GPTQ (2210.17323), SparseGPT (2301.00774), and both decided together.

What is lost at position i of the contraction is made up for by the positions behind it, in the least-squares sense of
the activations that calibration saw, each token's scaled to one norm (`hsai.formats.observed.level_rows`). With U of
`hsai.compress.factor`, an error e_i = (w_i - v_i) / U_ii costs e_i^2 of the squared output error, and the rows behind i
become w_j - U_ij e_i. So the loss of a whole weight is the sum of all e_i^2, and everything that is chosen on the way
(scales, masks: `hsai.compress.groups`) is chosen to keep that sum small.

The last positions have nobody to make up for them and count in full, so another order than the natural one may serve
better: that of falling activations, the "act-order" of 2210.17323's authors (in their code `desc_act`, with
`static_groups`).

Positions that a format keeps apart (`hsai.formats.outliers`) are in no group's scale and need no place in a mask; they
make up for errors before them like others, and leave next to none.

D contraction, F outputs, G positions of a scale group, M positions of a sparsity group, B positions of a lazy block.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from hsai.compress.grid import Grid, Pattern
from hsai.compress.groups import (
    choose_mask,
    feed_back,
    leave_out,
    rank_roughly,
    search_scales,
    spread_scales,
    weigh_positions,
)
from hsai.sharding import constrain

BLOCK = 128
"""Positions whose errors reach the rows behind them in one product (2210.17323, step 2)."""

MOST_SPAN = 16
"""Positions of a sparsity group that is solved in one piece, in a program that is as long as their pairs are many."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solved:
    """values (D, F) float32 that the format holds exactly; mask bool (D, F), all true without a pattern; scale
    (D / G, F) or (1, F), None without a grid."""

    values: jax.Array
    mask: jax.Array
    scale: jax.Array | None


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
    rest = leave_out(w, apart)
    if order is None:
        fixed = None
        if grid is not None and grid.group is None:
            fixed = search_scales(rest, weigh_positions(upper, apart), grid, pattern, mask)
        spread = None if fixed is None else spread_scales(fixed, w)
        values, kept, scales = _solve(w, upper, apart, grid, pattern, mask, spread)
        return Solved(values, kept, scales if fixed is None else fixed)
    back = jnp.argsort(order)
    fixed = (
        None if grid is None else search_scales(rest, weigh_positions(upper, apart[order])[back], grid, pattern, mask)
    )
    spread, given = (None if fixed is None else spread_scales(fixed, w)[order]), (None if mask is None else mask[order])
    values, kept, _ = _solve(w[order], upper, apart[order], grid, pattern, given, spread)
    return Solved(values[back], kept[back], fixed)


def order_positions(gram: jax.Array, pattern: Pattern | None) -> jax.Array:
    """The positions int32 (D,) in the order of falling activations; groups of a pattern stay whole, the one with the
    largest sum first."""
    span = pattern.m if pattern is not None else 1
    squares = jnp.sum(jnp.diagonal(gram).reshape(-1, span), axis=-1)
    first = jnp.argsort(-squares, stable=True) * span
    return (first[:, None] + jnp.arange(span)).reshape(-1)


def _solve(
    w: jax.Array,
    upper: jax.Array,
    apart: jax.Array,
    grid: Grid | None,
    pattern: Pattern | None,
    mask: jax.Array | None,
    fixed: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """values (D, F), mask (D, F), and the scales (D / G, F) that were searched; `fixed` (D, F) are scales to be taken
    as they are."""
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
        w, values, kept, scales = state
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
        return w, values, kept, scales

    width = outputs if grid is None else grid.count_scales(outputs)
    shapes = (jnp.zeros_like(w), jnp.ones(w.shape, bool), jnp.zeros((w.shape[0] // group, width), jnp.float32))
    _, values, kept, scales = jax.lax.fori_loop(0, w.shape[0] // block, step, (w, *shapes))
    searched = None if grid is None or fixed is not None else scales[: size // group].astype(grid.dtype)
    return values[:size], kept[:size], searched


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
    importance = weigh_positions(upper, apart)

    def cut(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size)

    def step(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w, values, kept, scales, errors = state
        start = index * span
        first = start // group * group
        if pattern is not None and ranked:

            def rank() -> jax.Array:
                rows, weight = leave_out(cut(w, start, unit), cut(apart, start, unit)), cut(importance, start, unit)
                known = None if fixed is None else cut(fixed, start, unit)
                mask = rank_roughly(rows, weight, known, grid, pattern)
                return jax.lax.dynamic_update_slice_in_dim(kept, mask, start, 0)

            kept = jax.lax.cond(start % unit == 0, rank, lambda: kept)
        if grid is not None and fixed is None:

            def search() -> jax.Array:
                part = cut(kept, first, group) if ranked or given is not None else None
                rows, weight = leave_out(cut(w, first, group), cut(apart, first, group)), cut(importance, first, group)
                return search_scales(rows, weight, grid, pattern, part).astype(jnp.float32)

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
                mask = choose_mask(rows, factor, scale, alone, grid, pattern)
                kept = jax.lax.dynamic_update_slice_in_dim(kept, mask, start, 0)
            mask = cut(kept, start, span)
        rounded, missed = feed_back(rows, factor, scale, alone, grid, mask)
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
