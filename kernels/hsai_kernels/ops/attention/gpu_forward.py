"""The forward kernel of GPU attention: a block of rows against the keys that it reaches, under an online softmax.

Online softmax: Milakov and Gimelshein, 1805.02867; the loop: FlashAttention-2, Dao, 2307.08691, algorithm 1. Where rows
are few and keys many (decoding) the keys are split over programs, and their partial results put together after them,
as "flash-decoding" does (Dao, Haziza, Massa and Sizov, 2023).

Dimensions: B batch, T query, S key, N heads, K kv heads, H head dim; R rows and E keys a block, P >= H; C splits.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from hsai_kernels.block_product import multiply
from hsai_kernels.ops.attention import gpu_blocks as blocks
from hsai_kernels.ops.attention.gpu_blocks import LOG2_E, LOWEST, Marks, Plan, Tile

PROGRAMS = 256
"""How many programs fill a GPU of about 100 processors: no more splits than that takes."""

BLOCKS_A_SPLIT = 4
"""Fewer blocks of keys than this are not worth a program of their own, and a partial result."""


def count_splits(plan: Plan, tile: Tile) -> int:
    """C: into how many parts the keys are split. Only where rows make one block: partial results take C times the
    output's memory."""
    if plan.rows > tile.rows:
        return 1
    useful = pl.cdiv(pl.cdiv(plan.keys, tile.keys), BLOCKS_A_SPLIT)
    return max(1, min(useful, pl.cdiv(PROGRAMS, plan.batch * plan.kv_heads)))


def attend(
    plan: Plan,
    tile: Tile,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    at_q: Marks,
    at_k: Marks,
    scales: tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """The output (B, T, N, H) in q's dtype, and float32 (B, T * N), the base-2 logarithm of each row's sum.

    k and v of another dtype than q's are widened block by block; of int8 ones `scales` are those of k and v, (B, S, K).
    """
    row_blocks, key_blocks = pl.cdiv(plan.rows, tile.rows), pl.cdiv(plan.keys, tile.keys)
    splits = count_splits(plan, tile)
    first, stop = blocks.find_range(blocks.find_reach(plan, tile.rows, tile.keys, at_q, at_k), axis=2)
    flat = plan.queries * plan.heads
    out, logs = pl.pallas_call(
        functools.partial(_attend_kernel, plan, tile, pl.cdiv(key_blocks, splits)),
        grid=(row_blocks, splits, plan.kv_heads, plan.batch),
        in_specs=[
            blocks.specify_rows(plan),
            blocks.specify_keys(plan, tile),
            blocks.specify_keys(plan, tile),
            blocks.specify_vector(row_blocks),
            blocks.specify_vector(row_blocks),
            tuple(blocks.specify_vector(plan.queries) for _ in at_q),
            blocks.specify_key_marks(plan, tile, at_k),
            (blocks.specify_key_scales(plan, tile),) * len(scales),
        ],
        out_specs=[
            pl.BlockSpec((None, None, flat, plan.width), lambda _, split, head, batch: (split, batch, 0, 0)),
            pl.BlockSpec((None, None, flat), lambda _, split, head, batch: (split, batch, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((splits, plan.batch, flat, plan.head_dim), q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((splits, plan.batch, flat), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=_estimate(plan, splits, q, (k, v, *scales)),
        interpret=plan.interpret,
        name="attention_forward",
    )(q.reshape(plan.batch, flat, plan.head_dim), k, v, first, stop, at_q, at_k, scales)
    if splits == 1:
        return out.reshape(q.shape), logs[0]
    # Every split's output is divided by its own sum: weighing them by these sums is the softmax over all.
    largest = jnp.max(logs, axis=0)
    weights = jnp.exp2(logs - largest)
    total = jnp.sum(weights, axis=0)
    out = jnp.sum(out * weights[..., None], axis=0) / total[..., None]
    return out.astype(q.dtype).reshape(q.shape), largest + jnp.log(total) * LOG2_E


def _attend_kernel(
    plan: Plan,
    tile: Tile,
    blocks_a_split: int,
    q_ref: jax.Array,
    k_ref: jax.Array,
    v_ref: jax.Array,
    first_ref: jax.Array,
    stop_ref: jax.Array,
    q_marks: Marks,
    k_marks: Marks,
    scale_refs: tuple[jax.Array, ...],
    out_ref: jax.Array,
    log_ref: jax.Array,
) -> None:
    """One block of rows of one kv head, and one split of the keys; programs (row blocks, C, K, B)."""
    block, split = pl.program_id(0), pl.program_id(1)
    rows = blocks.locate_rows(plan, tile, block, pl.program_id(2))
    q = blocks.load_rows(plan, q_ref, rows)
    at_q = tuple(mark[:, None] for mark in blocks.load_row_marks(rows, q_marks))

    def add(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, out = carry
        real = blocks.find_keys(plan, tile, index)
        at_k = tuple(mark[None, :] for mark in blocks.load_key_marks(plan, tile, k_marks, index))
        visible = blocks.find_visible(plan, at_q, at_k, None if real is None else real[None, :])
        # A scale is a key's: it multiplies a column of scores, and of weights, in the place of a row of codes.
        key_scale, value_scale = blocks.load_key_marks(plan, tile, scale_refs, index) if scale_refs else (None, None)
        scores, _ = blocks.score(plan, q, blocks.load_keys(plan, tile, k_ref, index).astype(q.dtype), key_scale)
        scores = jnp.where(visible, scores, LOWEST)
        higher = jnp.maximum(largest, jnp.max(scores, axis=1))
        # Rows that see nothing yet have scores equal to their maximum: the mask makes their weights zero.
        weights = jnp.where(visible, jnp.exp2(scores - higher[:, None]), 0.0)
        shrink = jnp.exp2(largest - higher)
        total = total * shrink + jnp.sum(weights, axis=1)
        if value_scale is not None:
            weights = weights * value_scale[None, :]
        values = blocks.load_keys(plan, tile, v_ref, index).astype(q.dtype)
        out = out * shrink[:, None] + multiply(weights.astype(q.dtype), values)
        return higher, total, out

    start = (
        jnp.full((tile.rows,), LOWEST, jnp.float32),
        jnp.zeros((tile.rows,), jnp.float32),
        jnp.zeros((tile.rows, plan.width), jnp.float32),
    )
    lower = jnp.maximum(first_ref[block], split * blocks_a_split)
    upper = jnp.minimum(stop_ref[block], (split + 1) * blocks_a_split)
    largest, total, out = jax.lax.fori_loop(lower, upper, add, start)
    total = jnp.where(total == 0.0, 1.0, total)
    blocks.store_rows(plan, out_ref, rows, out / total[:, None])
    plgpu.store(log_ref.at[rows.index], largest + jnp.log(total) * LOG2_E, mask=rows.real)


def _estimate(plan: Plan, splits: int, q: jax.Array, cached: tuple[jax.Array, ...]) -> pl.CostEstimate:
    """What is done if every query sees every key: how much is skipped depends on data."""
    scores = plan.batch * plan.heads * plan.queries * plan.keys
    # The log of each row's sum, and the output: that of a split is float32.
    written = splits * plan.batch * plan.queries * plan.heads * 4
    written += q.nbytes if splits == 1 else splits * q.size * 4
    return pl.CostEstimate(
        flops=4 * scores * plan.head_dim,
        transcendentals=scores,
        bytes_accessed=q.nbytes + written + sum(array.nbytes for array in cached),
    )
