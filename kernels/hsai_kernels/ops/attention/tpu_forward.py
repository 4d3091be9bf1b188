"""The forward pass of attention on a TPU: blocks of keys pass by a block of rows under a running maximum and sum.

(Online softmax: Milakov and Gimelshein, 1805.02867; FlashAttention-2: Dao, 2307.08691, algorithm 1.)

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
    LOWEST,
    Options,
    find_bounds,
    find_visible,
    is_needed,
    score,
    set_semantics,
    turn_row,
    widen,
)


def attend(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    at_rows: jax.Array,
    at_keys: jax.Array,
    scales: tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """The output (B, K, R, H) in q's dtype, and float32 (B, K, 1, R'): the logarithm of each row's sum of weights.

    Args:
      q: (B, K, R, H), R a multiple of the rows a block.
      k, v: (B, K, S, H), S a multiple of the keys a block.
      at_rows, at_keys: int32 (B, M, R') and (B, M, S): marks; R' is R, or 128 where a block has fewer rows.
      scales: of int8 k and v, float32 (B, K, 1, S) each.
    """
    rows, keys = options.forward
    batch, heads, length, head_dim = q.shape
    marks = at_rows.shape[1]
    grid = (batch, heads, length // rows, k.shape[2] // keys)
    bounds = find_bounds(options, at_rows, at_keys, rows, keys, by_keys=False)
    wide = max(rows, LANES)

    def fetched(b: Any, i: Any, j: Any, first: Any, last: Any) -> Any:
        # A block outside the range is the one that is there already: nothing is fetched for it.
        return jnp.clip(j, first[b * grid[2] + i], last[b * grid[2] + i])

    queries = pl.BlockSpec((1, 1, rows, head_dim), lambda b, h, i, j, *_: (b, h, i, 0))
    others = pl.BlockSpec(
        (1, 1, keys, head_dim), lambda b, h, i, j, first, last, *_: (b, h, fetched(b, i, j, first, last), 0)
    )
    key_marks = pl.BlockSpec(
        (1, marks, keys), lambda b, h, i, j, first, last, *_: (b, 0, fetched(b, i, j, first, last))
    )
    key_scales = pl.BlockSpec(
        (1, 1, 1, keys), lambda b, h, i, j, first, last, *_: (b, h, 0, fetched(b, i, j, first, last))
    )
    return pl.pallas_call(
        functools.partial(_attend_block, options, marks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=grid,
            in_specs=[
                queries,
                others,
                others,
                pl.BlockSpec((1, marks, wide), lambda b, h, i, j, *_: (b, 0, i)),
                key_marks,
                (key_scales,) * len(scales),
            ],
            out_specs=[queries, pl.BlockSpec((1, 1, 1, wide), lambda b, h, i, j, *_: (b, h, 0, i))],
            scratch_shapes=[
                pltpu.VMEM((wide, LANES), jnp.float32),
                pltpu.VMEM((wide, LANES), jnp.float32),
                pltpu.VMEM((rows, head_dim), jnp.float32),
                pltpu.VMEM((marks, wide, LANES), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, grid[2] * wide), jnp.float32),
        ],
        compiler_params=set_semantics(),
        # As if every query saw every key: who sees whom is data.
        cost_estimate=pl.CostEstimate(
            flops=4 * q.size * k.shape[2],
            transcendentals=(q.size // head_dim) * k.shape[2] * (1 if options.softcap is None else 2),
            bytes_accessed=2 * q.nbytes + grid[2] * sum(array.nbytes for array in (k, v, *scales)),
        ),
        name="attention_forward",
    )(bounds.first, bounds.last, bounds.rows, bounds.keys, q, k, v, at_rows, at_keys, scales)


def _attend_block(
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
    scales: tuple[Any, ...],
    out: Any,
    log_sum: Any,
    largest: Any,
    total: Any,
    summed: Any,
    columns: Any,
) -> None:
    """Rows (C, H) by keys (E, H); largest, total (C', 128) are the same in every lane, as is columns (M, C', 128)."""
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    rows, keys = q.shape[2], k.shape[2]

    @pl.when(j == 0)
    def _() -> None:
        largest[...] = jnp.full(largest.shape, LOWEST, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        summed[...] = jnp.zeros(summed.shape, jnp.float32)
        for m in range(marks):
            columns[m] = turn_row(at_rows[0, m : m + 1, :])

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
        # A scale is a key's: it multiplies a column of scores, and of weights, in the place of a row of codes.
        key_scale, value_scale = (scale[0, 0] for scale in scales) if scales else (None, None)
        scores = jnp.where(visible, score(options, q[0, 0], widen(k[0, 0], q.dtype), key_scale), LOWEST)
        before = largest[:rows]
        higher = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        # Hidden once more after exp: a row that sees nothing has a maximum of LOWEST, and exp(0) for all.
        weights = jnp.where(visible, jnp.exp(scores - higher[:, :1]), 0.0)
        shrink = jnp.exp(before - higher)
        largest[:rows] = higher
        total[:rows] = total[:rows] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        if value_scale is not None:
            weights = weights * value_scale
        product = multiply(weights.astype(q.dtype), widen(v[0, 0], q.dtype), (1, 0))
        summed[...] = summed[...] * shrink[:, :1] + product

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        whole = jnp.where(total[...] == 0.0, 1.0, total[...])
        out[0, 0] = (summed[...] / whole[:rows, :1]).astype(out.dtype)
        log_sum[0, 0] = jnp.transpose(largest[...] + jnp.log(whole))[:1]
