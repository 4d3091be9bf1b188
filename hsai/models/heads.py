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
QUERY_MARKS: Axes = ("batch", "seq")
KEY_MARKS: Axes = ("batch", "cache")


def attend_heads(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
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

    Args and result: as of `attention`; q (B, T, N, H), k and v (B, S, K, H).
    """
    splits = dict(find_splits((HEADS, q), (KEY_MARKS, kv_positions)))

    def attend(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        q_positions: jax.Array,
        kv_positions: jax.Array,
        q_segments: jax.Array | None,
        kv_segments: jax.Array | None,
    ) -> jax.Array:
        return attention(
            q,
            k,
            v,
            q_positions=q_positions,
            kv_positions=kv_positions,
            q_segments=q_segments,
            kv_segments=kv_segments,
            window=window,
            scale=scale,
        )

    marks = (q_positions, kv_positions, q_segments, kv_segments)
    if splits["seq"] or splits["cache"]:
        return attend(q, k, v, *marks)
    kv_heads, devices = k.shape[2], count_parts(splits["heads"])
    if kv_heads % devices:
        if devices % kv_heads:
            splits["heads"] = ()
        else:
            k, v = share_heads(k, devices // kv_heads), share_heads(v, devices // kv_heads)
    in_axes = (HEADS, KEYS, KEYS, QUERY_MARKS, KEY_MARKS, QUERY_MARKS, KEY_MARKS)
    y: jax.Array = map_shards(attend, splits, in_axes, HEADS)(q, k, v, *marks)
    return y


def share_heads(x: jax.Array, copies: int) -> jax.Array:
    """(B, S, K, H) -> (B, S, K * copies, H): each head `copies` times, one behind the other.

    By way of float32, which changes no value, so that its gradient is added up in float32.
    """
    return jnp.repeat(x.astype(jnp.float32), copies, axis=2).astype(x.dtype)
