"""The backward pass of attention on a TPU: scores are made again, in one pass for queries and one for keys.

(FlashAttention-2: Dao, 2307.08691, algorithm 2, split so that each pass keeps its sums in fast memory.)
In the pass for keys, scores are transposed, keys by rows: then nothing is transposed before a product, and what belongs
to a row (its marks, its sum) broadcasts along lanes as it lies in memory.

Dimensions: B batch, K kv heads, R rows (padded), S keys (padded), H head dim, M marks, C rows and E keys a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hsai_kernels.block_product import multiply
from hsai_kernels.mosaic import LANES
from hsai_kernels.ops.attention.tpu_blocks import (
    Options,
    find_bounds,
    find_visible,
    is_needed,
    score,
    set_semantics,
    turn_row,
)


def differentiate_queries(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    at_rows: jax.Array,
    at_keys: jax.Array,
    log_sum: jax.Array,
    pull: jax.Array,
    grad: jax.Array,
) -> jax.Array:
    """The gradient of q, (B, K, R, H) in its dtype.

    Args:
      q, grad: (B, K, R, H); grad is that of the output, in q's dtype.
      k, v: (B, K, S, H).
      at_rows, at_keys: int32 (B, M, R') and (B, M, S).
      log_sum, pull: float32 (B, K, 1, R'): the logarithm of each row's sum, and grad . output of each row.
    """
    rows, keys = options.backward
    batch, heads, length, head_dim = q.shape
    marks, wide = at_rows.shape[1], max(rows, LANES)
    grid = (batch, heads, length // rows, k.shape[2] // keys)
    bounds = find_bounds(options, at_rows, at_keys, rows, keys, by_keys=False)

    def fetched(b: Any, i: Any, j: Any, first: Any, last: Any) -> Any:
        return jnp.clip(j, first[b * grid[2] + i], last[b * grid[2] + i])

    queries = pl.BlockSpec((1, 1, rows, head_dim), lambda b, h, i, j, *_: (b, h, i, 0))
    others = pl.BlockSpec(
        (1, 1, keys, head_dim), lambda b, h, i, j, first, last, *_: (b, h, fetched(b, i, j, first, last), 0)
    )
    row = pl.BlockSpec((1, 1, 1, wide), lambda b, h, i, j, *_: (b, h, 0, i))
    return pl.pallas_call(
        functools.partial(_sum_over_keys, options, marks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=grid,
            in_specs=[
                queries,
                others,
                others,
                pl.BlockSpec((1, marks, wide), lambda b, h, i, j, *_: (b, 0, i)),
                pl.BlockSpec(
                    (1, marks, keys), lambda b, h, i, j, first, last, *_: (b, 0, fetched(b, i, j, first, last))
                ),
                row,
                row,
                queries,
            ],
            out_specs=queries,
            scratch_shapes=[
                pltpu.VMEM((rows, head_dim), jnp.float32),
                pltpu.VMEM((marks, wide, LANES), jnp.int32),
                pltpu.VMEM((2, wide, LANES), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=set_semantics(),
        cost_estimate=pl.CostEstimate(
            flops=6 * q.size * k.shape[2],
            transcendentals=(q.size // head_dim) * k.shape[2] * (1 if options.softcap is None else 2),
            bytes_accessed=3 * q.nbytes + grid[2] * (k.nbytes + v.nbytes),
        ),
        name="attention_backward_queries",
    )(bounds.first, bounds.last, bounds.rows, bounds.keys, q, k, v, at_rows, at_keys, log_sum, pull, grad)


def _sum_over_keys(
    options: Options,
    marks: int,
    first: Any,
    last: Any,
    row_bounds: Any,
    key_bounds: Any,
    q: Any,
    k: Any,
    v: Any,
    at_rows: Any,
    at_keys: Any,
    log_sum: Any,
    pull: Any,
    grad: Any,
    d_q: Any,
    summed: Any,
    columns: Any,
    statistics: Any,
) -> None:
    """Rows (C, H) stay while keys (E, H) pass by; columns (M, C', 128) and statistics (2, C', 128) as in forward."""
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    rows, keys = q.shape[2], k.shape[2]

    @pl.when(j == 0)
    def _() -> None:
        summed[...] = jnp.zeros(summed.shape, jnp.float32)
        for m in range(marks):
            columns[m] = turn_row(at_rows[0, m : m + 1, :])
        statistics[0] = turn_row(log_sum[0, 0])
        statistics[1] = turn_row(pull[0, 0])

    needed = is_needed(options, row_bounds, key_bounds, b * pl.num_programs(2) + i, b * pl.num_programs(3) + j, marks)

    @pl.when(needed)
    def _() -> None:
        index = jax.lax.broadcasted_iota(jnp.int32, (rows, keys), 1) + j * keys
        visible = find_visible(
            options,
            [columns[m, :rows, :1] for m in range(marks)],
            [at_keys[0, m : m + 1, :] for m in range(marks)],
            index,
        )
        scores = score(options, q[0, 0], k[0, 0])
        weights = jnp.where(visible, jnp.exp(scores - statistics[0, :rows, :1]), 0.0)
        d_weights = multiply(grad[0, 0], v[0, 0], (1, 1))
        d_scores = _differentiate_softmax(options, scores, weights, d_weights, statistics[1, :rows, :1])
        summed[...] += multiply(d_scores.astype(k.dtype), k[0, 0], (1, 0))

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        d_q[0, 0] = summed[...].astype(d_q.dtype)


def differentiate_keys(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    at_rows: jax.Array,
    at_keys: jax.Array,
    log_sum: jax.Array,
    pull: jax.Array,
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of k and v, (B, K, S, H) each in their dtype; arguments as of `differentiate_queries`."""
    rows, keys = options.backward
    batch, heads, length, head_dim = q.shape
    marks, wide = at_rows.shape[1], max(rows, LANES)
    grid = (batch, heads, k.shape[2] // keys, length // rows)
    bounds = find_bounds(options, at_rows, at_keys, rows, keys, by_keys=True)

    def fetched(b: Any, j: Any, i: Any, first: Any, last: Any) -> Any:
        return jnp.clip(i, first[b * grid[2] + j], last[b * grid[2] + j])

    queries = pl.BlockSpec(
        (1, 1, rows, head_dim), lambda b, h, j, i, first, last, *_: (b, h, fetched(b, j, i, first, last), 0)
    )
    others = pl.BlockSpec((1, 1, keys, head_dim), lambda b, h, j, i, *_: (b, h, j, 0))
    row = pl.BlockSpec((1, 1, 1, wide), lambda b, h, j, i, first, last, *_: (b, h, 0, fetched(b, j, i, first, last)))
    return pl.pallas_call(
        functools.partial(_sum_over_rows, options, marks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=grid,
            in_specs=[
                queries,
                others,
                others,
                pl.BlockSpec(
                    (1, marks, wide), lambda b, h, j, i, first, last, *_: (b, 0, fetched(b, j, i, first, last))
                ),
                pl.BlockSpec((1, marks, keys), lambda b, h, j, i, *_: (b, 0, j)),
                row,
                row,
                queries,
            ],
            out_specs=[others, others],
            scratch_shapes=[
                pltpu.VMEM((keys, head_dim), jnp.float32),
                pltpu.VMEM((keys, head_dim), jnp.float32),
                pltpu.VMEM((marks, keys, LANES), jnp.int32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=set_semantics(),
        cost_estimate=pl.CostEstimate(
            flops=8 * q.size * k.shape[2],
            transcendentals=(q.size // head_dim) * k.shape[2] * (1 if options.softcap is None else 2),
            bytes_accessed=2 * (k.nbytes + v.nbytes) + grid[2] * 2 * q.nbytes,
        ),
        name="attention_backward_keys",
    )(bounds.first, bounds.last, bounds.rows, bounds.keys, q, k, v, at_rows, at_keys, log_sum, pull, grad)


def _sum_over_rows(
    options: Options,
    marks: int,
    first: Any,
    last: Any,
    row_bounds: Any,
    key_bounds: Any,
    q: Any,
    k: Any,
    v: Any,
    at_rows: Any,
    at_keys: Any,
    log_sum: Any,
    pull: Any,
    grad: Any,
    d_k: Any,
    d_v: Any,
    summed_k: Any,
    summed_v: Any,
    columns: Any,
) -> None:
    """Keys (E, H) stay while rows (C, H) pass by; columns (M, E, 128) hold the marks of the keys."""
    b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    rows, keys = q.shape[2], k.shape[2]

    @pl.when(i == 0)
    def _() -> None:
        summed_k[...] = jnp.zeros(summed_k.shape, jnp.float32)
        summed_v[...] = jnp.zeros(summed_v.shape, jnp.float32)
        for m in range(marks):
            columns[m] = turn_row(at_keys[0, m : m + 1, :])

    needed = is_needed(options, row_bounds, key_bounds, b * pl.num_programs(3) + i, b * pl.num_programs(2) + j, marks)

    @pl.when(needed)
    def _() -> None:
        index = jax.lax.broadcasted_iota(jnp.int32, (keys, rows), 0) + j * keys
        visible = find_visible(
            options,
            [at_rows[0, m : m + 1, :rows] for m in range(marks)],
            [columns[m, :, :1] for m in range(marks)],
            index,
        )
        scores = score(options, k[0, 0], q[0, 0])
        weights = jnp.where(visible, jnp.exp(scores - log_sum[0, 0, :, :rows]), 0.0)
        summed_v[...] += multiply(weights.astype(grad.dtype), grad[0, 0], (1, 0))
        d_weights = multiply(v[0, 0], grad[0, 0], (1, 1))
        d_scores = _differentiate_softmax(options, scores, weights, d_weights, pull[0, 0, :, :rows])
        summed_k[...] += multiply(d_scores.astype(q.dtype), q[0, 0], (1, 0))

    @pl.when(i == pl.num_programs(3) - 1)
    def _() -> None:
        d_k[0, 0] = summed_k[...].astype(d_k.dtype)
        d_v[0, 0] = summed_v[...].astype(d_v.dtype)


def _differentiate_softmax(
    options: Options, scores: jax.Array, weights: jax.Array, d_weights: jax.Array, pull: jax.Array
) -> jax.Array:
    """The gradient of q . k, from that of its weight; `pull` is what all weights of a row pull together."""
    d_scores = weights * (d_weights - pull) * options.scale
    return d_scores if options.softcap is None else d_scores * (1.0 - jnp.square(scores / options.softcap))
