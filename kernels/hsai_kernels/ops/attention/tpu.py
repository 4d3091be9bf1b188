"""TPU backend of attention (Pallas, Mosaic): flash attention, memory linear in length, forward and backward.

The query heads that share a kv head become rows of one block, query by query. So keys and values are fetched once a
group; decoding (one query, a cache of S slots) is the same kernel, with blocks as small as 16 rows, and reads only the
blocks of the cache that some row of the batch fills. Positions, window and segments decide which blocks are read
(tpu_blocks.py).

The kernels want heads before rows: q, k, v are transposed around them. XLA can choose the layout of a cache that a loop
carries such that this moves nothing; where the cache is an argument of the program, it is copied once.

A cache of fewer bits than the queries (int8 with scales, bfloat16 under float32) is read as it is stored and widened
block by block in fast memory; where a gradient is taken, the chunked backend serves it. One of 4 bits is widened as a
whole in front of the kernels: its half heads would be padded to 128 lanes, in memory as well.

Head dims that do not fill 128 lanes (64, 80) are padded to them by the memory's own tiles, here as everywhere on a TPU.

Dimensions: B batch, T query, S key, N heads, K kv heads, G = N / K, R = T * G rows, H head dim, M marks.
"""

import functools

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import check_platform
from hsai_kernels.gradients import differentiate_through
from hsai_kernels.mosaic import LANES
from hsai_kernels.ops.attention.chunked import attention_chunked
from hsai_kernels.ops.attention.reference import read_cache
from hsai_kernels.ops.attention.tpu_backward import differentiate_keys, differentiate_queries
from hsai_kernels.ops.attention.tpu_blocks import Options, choose_blocks, pad_marks, pad_rows
from hsai_kernels.ops.attention.tpu_forward import attend

Saved = tuple[jax.Array, ...]


def attention_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    *,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> jax.Array:
    """Softmax attention over the visible keys; arguments and shapes as in api.py, already validated.

    Raises NotImplementedError for what it does not support.
    """
    check_platform("tpu")
    if 0 in q.shape or 0 in k.shape:
        raise NotImplementedError(f"has operands that are not empty, not q {q.shape} and k {k.shape}")
    if k.dtype == jnp.uint8:
        k, v = (read_cache(cache, by, q.dtype).astype(q.dtype) for cache, by in ((k, k_scale), (v, v_scale)))
        k_scale = v_scale = None
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    forward, backward = choose_blocks(queries * group, keys, head_dim, q.dtype)
    options = Options(window=window, softcap=softcap, scale=scale, forward=forward, backward=backward, keys=keys)
    operands = (q, k, v, q_positions, kv_positions, q_segments, kv_segments, k_scale, v_scale)
    kernel = functools.partial(_attend_heads, options)
    if k.dtype == q.dtype:
        return kernel(*operands)
    reference = functools.partial(attention_chunked, window=window, softcap=softcap, scale=scale)
    return differentiate_through(reference, kernel)(*operands)


def _attend_heads(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
) -> jax.Array:
    """As attention_tpu, with heads before rows around the kernels; only keys and values of q's dtype have gradients."""
    batch, queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    rows = q.reshape(batch, queries, kv_heads, group, head_dim).swapaxes(1, 2)
    rows = rows.reshape(batch, kv_heads, queries * group, head_dim)
    at_rows = jnp.repeat(_stack_marks(q_positions, q_segments), group, axis=2)
    at_keys = _stack_marks(kv_positions, kv_segments)
    arrays = (rows, k.swapaxes(1, 2), v.swapaxes(1, 2), at_rows, at_keys)
    if k.dtype == q.dtype:
        out = _attend(options, *arrays)
    else:
        scales = tuple(s.swapaxes(1, 2)[:, :, None] for s in (k_scale, v_scale) if s is not None)
        out = _attend_padded(options, *arrays, scales)[0]
    return out.reshape(batch, kv_heads, queries, group, head_dim).swapaxes(1, 2).reshape(q.shape)


def _stack_marks(positions: jax.Array, segments: jax.Array | None) -> jax.Array:
    """int32 (B, M, length)."""
    marks = [positions] if segments is None else [positions, segments]
    return jnp.stack(marks, axis=1).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, at_rows: jax.Array, at_keys: jax.Array
) -> jax.Array:
    """(B, K, R, H) of q's dtype, from q (B, K, R, H) and k, v (B, K, S, H)."""
    return _attend_and_save(options, q, k, v, at_rows, at_keys)[0]


def _attend_and_save(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, at_rows: jax.Array, at_keys: jax.Array
) -> tuple[jax.Array, Saved]:
    """The output, and what the backward pass needs: all arguments, the output, and each row's log of its sum."""
    out, log_sum = _attend_padded(options, q, k, v, at_rows, at_keys)
    return out, (q, k, v, at_rows, at_keys, out, log_sum)


def _attend_padded(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    at_rows: jax.Array,
    at_keys: jax.Array,
    scales: tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """The output (B, K, R, H), and float32 (B, K, 1, R), each row's log of its sum; scales (B, K, 1, S)."""
    length, (rows, keys) = q.shape[2], options.forward
    out, log_sum = attend(
        options,
        pad_rows(q, rows),
        pad_rows(k, keys),
        pad_rows(v, keys),
        pad_marks(at_rows, rows),
        pad_marks(at_keys, keys),
        tuple(_pad_keys(scale, keys) for scale in scales),
    )
    return out[:, :, :length], log_sum[:, :, :, :length]


def _differentiate(options: Options, saved: Saved, grad: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, at_rows, at_keys, out, log_sum = saved
    rows, keys = options.backward
    pull = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]
    operands = (
        pad_rows(q, rows),
        pad_rows(k, keys),
        pad_rows(v, keys),
        pad_marks(at_rows, rows),
        pad_marks(at_keys, keys),
        _pad_statistics(log_sum, rows),
        _pad_statistics(pull, rows),
        # Padded rows may see keys; with a gradient of zero they add nothing.
        pad_rows(grad, rows),
    )
    d_q = differentiate_queries(options, *operands)[:, :, : q.shape[2]]
    d_k, d_v = (gradient[:, :, : k.shape[2]] for gradient in differentiate_keys(options, *operands))
    return d_q, d_k, d_v, None, None


_attend.defvjp(_attend_and_save, _differentiate)


def _pad_keys(x: jax.Array, block: int) -> jax.Array:
    """float32 (B, K, 1, S) with zeros up to whole blocks."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % block)))


def _pad_statistics(x: jax.Array, block: int) -> jax.Array:
    """float32 (B, K, 1, R) with zeros up to whole blocks and lanes: a padded row of zeros then has weights of one."""
    wanted = -(-x.shape[3] // block) * max(block, LANES)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, wanted - x.shape[3])))
