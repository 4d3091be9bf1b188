"""The backward kernels of GPU attention: gradients of the rows in one, of keys and values in another, without atomics.

Both make the weights again from the logarithms that the forward pass kept (FlashAttention-2: Dao, 2307.08691, algorithm
2). The sum over the query heads of a group is a sum over rows, inside the second kernel.

Dimensions: B batch, T query, S key, N heads, K kv heads, H head dim; R rows and E keys a block, P >= H.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from hsai_kernels.block_product import multiply
from hsai_kernels.ops.attention import gpu_blocks as blocks
from hsai_kernels.ops.attention.gpu_blocks import Marks, Plan, Tile, Tiles


def pull_back(
    plan: Plan,
    tiles: Tiles,
    operands: tuple[jax.Array, jax.Array, jax.Array],
    at_q: Marks,
    at_k: Marks,
    out: jax.Array,
    logs: jax.Array,
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, from that of the output and what the forward pass kept: `out` and `logs` (B, T * N)."""
    q, k, v = operands
    flat = (plan.batch, plan.queries * plan.heads)
    # How much each row's weights pull together: sum_s weight * d weight, which is d out . out.
    pull = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).reshape(flat)
    q, grad = (x.reshape(*flat, plan.head_dim) for x in (q, grad))
    arrays = (q, grad, logs, pull, k, v)
    d_q = pull_back_rows(plan, tiles["d_rows"], arrays, at_q, at_k)
    d_k, d_v = pull_back_keys(plan, tiles["d_keys"], arrays, at_q, at_k)
    return d_q.reshape(operands[0].shape), d_k, d_v


def _specify_inputs(plan: Plan, tile: Tile, at_q: Marks, at_k: Marks, ranges: int) -> list:
    """Blocks of (q, grad, logs, pull, k, v), of the range of blocks to walk over, and of the marks."""
    rows, keys, flat = (
        blocks.specify_rows(plan),
        blocks.specify_keys(plan, tile),
        blocks.specify_vector(plan.queries * plan.heads),
    )
    bounds = blocks.specify_vector(ranges)
    q_marks = tuple(blocks.specify_vector(plan.queries) for _ in at_q)
    return [rows, rows, flat, flat, keys, keys, bounds, bounds, q_marks, blocks.specify_key_marks(plan, tile, at_k)]


def pull_back_rows(plan: Plan, tile: Tile, arrays: tuple[jax.Array, ...], at_q: Marks, at_k: Marks) -> jax.Array:
    """d q, (B, T * N, H) in q's dtype; `arrays` are q, grad (B, T * N, H), logs, pull (B, T * N), k and v."""
    row_blocks = pl.cdiv(plan.rows, tile.rows)
    first, stop = blocks.find_range(blocks.find_reach(plan, tile.rows, tile.keys, at_q, at_k), axis=2)
    return pl.pallas_call(
        functools.partial(_pull_back_rows_kernel, plan, tile),
        grid=(row_blocks, plan.kv_heads, plan.batch),
        in_specs=_specify_inputs(plan, tile, at_q, at_k, row_blocks),
        out_specs=blocks.specify_rows(plan),
        out_shape=jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=_estimate(plan, arrays, products=3),
        interpret=plan.interpret,
        name="attention_d_rows",
    )(*arrays, first, stop, at_q, at_k)


def _pull_back_rows_kernel(
    plan: Plan,
    tile: Tile,
    q_ref: jax.Array,
    grad_ref: jax.Array,
    log_ref: jax.Array,
    pull_ref: jax.Array,
    k_ref: jax.Array,
    v_ref: jax.Array,
    first_ref: jax.Array,
    stop_ref: jax.Array,
    q_marks: Marks,
    k_marks: Marks,
    d_q_ref: jax.Array,
) -> None:
    """One block of rows against the keys that it reaches; programs (row blocks, K, B)."""
    block = pl.program_id(0)
    rows = blocks.locate_rows(plan, tile, block, pl.program_id(1))
    q, grad = (blocks.load_rows(plan, ref, rows) for ref in (q_ref, grad_ref))
    logs, pull = (blocks.load_row_vectors(rows, ref)[:, None] for ref in (log_ref, pull_ref))
    at_q = tuple(mark[:, None] for mark in blocks.load_row_marks(rows, q_marks))

    def add(index: jax.Array, d_q: jax.Array) -> jax.Array:
        keys = blocks.load_keys(plan, tile, k_ref, index)
        real = blocks.find_keys(plan, tile, index)
        at_k = tuple(mark[None, :] for mark in blocks.load_key_marks(plan, tile, k_marks, index))
        visible = blocks.find_visible(plan, at_q, at_k, None if real is None else real[None, :])
        scores, slope = blocks.score(plan, q, keys)
        weights = jnp.where(visible, jnp.exp2(scores - logs), 0.0)
        d_weights = multiply(grad, blocks.load_keys(plan, tile, v_ref, index), (1, 1))
        d_scores = weights * (d_weights - pull)
        if slope is not None:
            d_scores *= slope
        return d_q + multiply(d_scores.astype(keys.dtype), keys)

    start = jnp.zeros((tile.rows, plan.width), jnp.float32)
    d_q = jax.lax.fori_loop(first_ref[block], stop_ref[block], add, start)
    blocks.store_rows(plan, d_q_ref, rows, d_q * plan.scale)


def pull_back_keys(
    plan: Plan, tile: Tile, arrays: tuple[jax.Array, ...], at_q: Marks, at_k: Marks
) -> tuple[jax.Array, jax.Array]:
    """d k and d v, (B, S, K, H) in k's dtype; arguments as in `pull_back_rows`."""
    k = arrays[4]
    key_blocks = pl.cdiv(plan.keys, tile.keys)
    first, stop = blocks.find_range(blocks.find_reach(plan, tile.rows, tile.keys, at_q, at_k), axis=1)
    d_k, d_v = pl.pallas_call(
        functools.partial(_pull_back_keys_kernel, plan, tile),
        grid=(key_blocks, plan.kv_heads, plan.batch),
        in_specs=_specify_inputs(plan, tile, at_q, at_k, key_blocks),
        out_specs=[blocks.specify_keys(plan, tile)] * 2,
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=_estimate(plan, arrays, products=4),
        interpret=plan.interpret,
        name="attention_d_keys",
    )(*arrays, first, stop, at_q, at_k)
    return d_k, d_v


def _pull_back_keys_kernel(
    plan: Plan,
    tile: Tile,
    q_ref: jax.Array,
    grad_ref: jax.Array,
    log_ref: jax.Array,
    pull_ref: jax.Array,
    k_ref: jax.Array,
    v_ref: jax.Array,
    first_ref: jax.Array,
    stop_ref: jax.Array,
    q_marks: Marks,
    k_marks: Marks,
    d_k_ref: jax.Array,
    d_v_ref: jax.Array,
) -> None:
    """One block of keys against the rows that reach it; programs (key blocks, K, B). Scores are (E, R) here, so that
    both products of the loop take them as they are."""
    block, kv_head = pl.program_id(0), pl.program_id(1)
    keys, values = (blocks.load_keys(plan, tile, ref, block) for ref in (k_ref, v_ref))
    at_k = tuple(mark[:, None] for mark in blocks.load_key_marks(plan, tile, k_marks, block))

    def add(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        d_keys, d_values = carry
        rows = blocks.locate_rows(plan, tile, index, kv_head)
        q, grad = (blocks.load_rows(plan, ref, rows) for ref in (q_ref, grad_ref))
        logs, pull = (blocks.load_row_vectors(rows, ref)[None, :] for ref in (log_ref, pull_ref))
        at_q = tuple(mark[None, :] for mark in blocks.load_row_marks(rows, q_marks))
        # Keys that are none need no mask: what they get is not stored.
        visible = blocks.find_visible(plan, at_q, at_k, rows.real[None, :])
        scores, slope = blocks.score(plan, keys, q)
        weights = jnp.where(visible, jnp.exp2(scores - logs), 0.0)
        d_weights = multiply(values, grad, (1, 1))
        d_scores = weights * (d_weights - pull)
        if slope is not None:
            d_scores *= slope
        return (
            d_keys + multiply(d_scores.astype(q.dtype), q),
            d_values + multiply(weights.astype(grad.dtype), grad),
        )

    zeros = jnp.zeros((tile.keys, plan.width), jnp.float32)
    d_keys, d_values = jax.lax.fori_loop(first_ref[block], stop_ref[block], add, (zeros, zeros))
    blocks.store_keys(plan, tile, d_k_ref, block, d_keys * plan.scale)
    blocks.store_keys(plan, tile, d_v_ref, block, d_values)


def _estimate(plan: Plan, arrays: tuple[jax.Array, ...], products: int) -> pl.CostEstimate:
    """What is done if every query sees every key: how much is skipped depends on data."""
    scores = plan.batch * plan.heads * plan.queries * plan.keys
    written = arrays[0].nbytes if products == 3 else 2 * arrays[4].nbytes
    return pl.CostEstimate(
        flops=2 * products * scores * plan.head_dim,
        transcendentals=scores,
        bytes_accessed=sum(array.nbytes for array in arrays) + written,
    )
