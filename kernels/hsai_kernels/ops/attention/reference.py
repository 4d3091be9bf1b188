"""Attention in plain jax.numpy: the meaning of the kernel, and the yardstick of every backend.

It materialises the scores (memory B * N * T * S floats), but never repeats keys or values over the query heads of a
group.

Dimensions: B batch, T query, S key, N heads, K kv heads, G = N / K query heads a kv head, R = G * T, H head dim.
"""

import jax
import jax.numpy as jnp


def attention_reference(
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
    """Softmax attention over the visible keys; arguments and shapes as in api.py, already validated."""
    k, v = read_cache(k, k_scale, q.dtype), read_cache(v, v_scale, q.dtype)
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    # The query heads of a group follow one another as rows of one product. With batch and kv heads in front, neither
    # the products nor their gradients transpose anything as large as the scores.
    rows = q.reshape(batch, queries, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * queries, head_dim)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkrh,bksh->bkrs", rows, k, preferred_element_type=jnp.float32) * scale
    scores = scores.reshape(batch, kv_heads, group, queries, keys)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    visible = find_visible(q_positions, kv_positions, q_segments, kv_segments, window=window)[:, None, None]

    # Hidden scores are replaced before exp and hidden weights after it: both gradients stay finite, and a row without
    # any visible key (whose maximum is then that of the replacements) has weights and denominator of exactly zero.
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - largest), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v.dtype).reshape(batch, kv_heads, group * queries, keys)
    out = jnp.einsum("bkrs,bksh->bkrh", weights, v, preferred_element_type=jnp.float32)
    out = out.reshape(batch, kv_heads, group, queries, head_dim) / jnp.where(total == 0.0, 1.0, total)
    return out.astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def read_cache(cache: jax.Array, scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Keys or values (B, S, K, H) as numbers to compute with: float32 from codes and their scales, else `dtype`."""
    if scale is None:
        return cache.astype(dtype)
    if cache.dtype == jnp.uint8:
        halves = unpack_halves(cache).astype(jnp.float32) * scale.astype(jnp.float32)[..., None]
        return halves.reshape(*cache.shape[:-1], -1)
    return cache.astype(jnp.float32) * scale[..., None]


def unpack_halves(packed: jax.Array) -> jax.Array:
    """The halves of heads, int8 (..., 2, H / 2) in [-8, 7], of uint8 (..., H / 2): the first half stands in the low 4
    bits of its bytes, the second in the high ones, both as two's complement."""
    both = packed.view(jnp.int8)
    return jnp.stack([(both << 4) >> 4, both >> 4], axis=-2)


def pack_halves(halves: jax.Array) -> jax.Array:
    """The inverse of `unpack_halves`."""
    low, high = halves[..., 0, :], halves[..., 1, :]
    return ((low & 15) | (high << 4)).view(jnp.uint8)


def find_visible(
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    *,
    window: int | None,
) -> jax.Array:
    """bool (B, T, S): the key is not after the query, within the window, and of the same segment."""
    visible = kv_positions[:, None, :] <= q_positions[:, :, None]
    if window is not None:
        distance = q_positions[:, :, None] - kv_positions[:, None, :]
        # Positions further apart than int32 reaches have a negative one.
        visible &= (0 <= distance) & (distance < window)
    if q_segments is not None and kv_segments is not None:
        visible &= q_segments[:, :, None] == kv_segments[:, None, :]
    return visible
