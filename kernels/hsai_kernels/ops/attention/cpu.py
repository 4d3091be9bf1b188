"""Native CPU backend of attention: decoding over a cache and prefill (kernels/csrc/attention.cc).

Scores exist for a block of keys at a time, and keys and values are read as they are stored, once for all query heads of
a kv head. A gradient takes the chunked backend, forward too: what its backward pass needs is what it keeps.

Dimensions: B batch, T query, S key, N heads, K kv heads, H head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hsai_kernels import native
from hsai_kernels.dispatch import check_platform
from hsai_kernels.gradients import differentiate_through
from hsai_kernels.ops.attention.chunked import attention_chunked


def attention_cpu(
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

    Weights are float32, for bfloat16 too. Raises NotImplementedError (or its BackendMissing) for what it does not
    support.
    """
    check_platform("cpu")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"has q of bfloat16 or float32, not of {q.dtype}")
    if 0 in q.shape or 0 in k.shape:
        raise NotImplementedError(f"has operands that are not empty, not q {q.shape} and k {k.shape}")
    native.load_library()
    reference = functools.partial(attention_chunked, window=window, softcap=softcap, scale=scale)
    kernel = functools.partial(_attend, window=window, softcap=softcap, scale=scale)
    attend = differentiate_through(reference, kernel)
    return attend(q, k, v, q_positions, kv_positions, q_segments, kv_segments, k_scale, v_scale)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    *,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> jax.Array:
    call = jax.ffi.ffi_call(native.ATTENTION, jax.ShapeDtypeStruct(q.shape, q.dtype), vmap_method="sequential")
    at = (q_positions, kv_positions, q_segments, kv_segments)
    result: jax.Array = call(
        q,
        k,
        v,
        *(jnp.zeros(0, jnp.int32) if marks is None else marks.astype(jnp.int32) for marks in at),
        *(jnp.zeros(0, jnp.float32) if scales is None else scales for scales in (k_scale, v_scale)),
        window=np.int64(window or 0),
        softcap=np.float32(softcap or 0.0),
        scale=np.float32(scale),
    )
    return result
