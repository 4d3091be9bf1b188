"""Attention of the heads that a device holds, for the rows that it holds: no device needs another's.

B batch, T query, S key, N heads, K kv heads, H head dim.
"""

import jax
import jax.numpy as jnp

from hsai.sharding import Axes
from hsai.shards import count_parts, find_splits, map_shards
from hsai_kernels import attention

HEADS: Axes = ("batch", "seq", "heads", "head_dim")
KEYS: Axes = ("batch", "cache", "heads", "head_dim")
SCALES: Axes = ("batch", "cache", "heads")
HALF_SCALES: Axes = (*SCALES, "head_dim")
QUERY_MARKS: Axes = ("batch", "seq")
KEY_MARKS: Axes = ("batch", "cache")


def attend_heads(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """`hsai_kernels.attention`, by the kernel of one device on each device of a mesh.

    Rows are split as a batch is, heads as "heads" are. Of fewer kv heads than devices each device gets the one that its
    query heads read; gradients of a kv head are added over the devices that share it, in float32. Kv heads that neither
    divide by the devices nor divide them are computed with all heads by each device.

    Where a sequence is split, the compiler splits plain jax: a device's queries read keys of others.

    Args and result: as of `attention`.
    """
    splits = dict(find_splits((HEADS, q), (KEY_MARKS, kv_positions)))

    def attend(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        k_scale: jax.Array | None,
        v_scale: jax.Array | None,
        q_positions: jax.Array,
        kv_positions: jax.Array,
        q_segments: jax.Array | None,
        kv_segments: jax.Array | None,
    ) -> jax.Array:
        return attention(
            q,
            k,
            v,
            k_scale=k_scale,
            v_scale=v_scale,
            q_positions=q_positions,
            kv_positions=kv_positions,
            q_segments=q_segments,
            kv_segments=kv_segments,
            window=window,
            scale=scale,
        )

    marks = (q_positions, kv_positions, q_segments, kv_segments)
    if splits["seq"] or splits["cache"]:
        return attend(q, k, v, k_scale, v_scale, *marks)
    kv_heads, devices = k.shape[2], count_parts(splits["heads"])
    if kv_heads % devices:
        if devices % kv_heads:
            splits["heads"] = ()
        else:
            copies = devices // kv_heads
            k, v = share_heads(k, copies), share_heads(v, copies)
            k_scale, v_scale = (None if x is None else share_heads(x, copies) for x in (k_scale, v_scale))
    scales = SCALES if k_scale is None or k_scale.ndim == len(SCALES) else HALF_SCALES
    in_axes = (HEADS, KEYS, KEYS, scales, scales, QUERY_MARKS, KEY_MARKS, QUERY_MARKS, KEY_MARKS)
    y: jax.Array = map_shards(attend, splits, in_axes, HEADS)(q, k, v, k_scale, v_scale, *marks)
    return y


def share_heads(x: jax.Array, copies: int) -> jax.Array:
    """(B, S, K, ...) -> (B, S, K * copies, ...): each head `copies` times, one behind the other.

    Floats by way of float32, which changes no value, so that their gradient is added up in float32.
    """
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.repeat(x, copies, axis=2)
    return jnp.repeat(x.astype(jnp.float32), copies, axis=2).astype(x.dtype)
