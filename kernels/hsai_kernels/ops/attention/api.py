"""`attention`: causal grouped-query attention whose mask follows from positions, a window and segments.

Positions and segments are data, so that one compiled program serves training on packed sequences, prefill, and decoding
over a cache with rows of different lengths: nothing here knows which of them it is.

Dimensions: B batch, T query, S key, N heads, K kv heads, H head dim.
"""

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import Backend, load_later, run_kernel
from hsai_kernels.ops.attention.chunked import attention_chunked
from hsai_kernels.ops.attention.cpu import attention_cpu
from hsai_kernels.ops.attention.reference import attention_reference
from hsai_kernels.options import check_count, check_factor, check_softcap

BACKENDS: dict[str, Backend] = {
    "chunked": attention_chunked,
    "cpu": attention_cpu,
    "gpu": load_later("hsai_kernels.ops.attention.gpu", "attention_gpu"),
    "reference": attention_reference,
    "tpu": load_later("hsai_kernels.ops.attention.tpu", "attention_tpu"),
}

SCALES = {jnp.dtype(jnp.int8): ("float32", ()), jnp.dtype(jnp.uint8): ("bfloat16", (2,))}
"""For integer caches: the dtype of scales, and how many a head has."""


def attention(
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
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention of each query over the keys that it may see (Vaswani et al. 2017; grouped as in 2305.13245).

    A query sees a key iff `kv_position <= q_position`, and (with a window) `q_position - kv_position < window`, and
    (with segments) both carry the same segment. A query that sees no key gives zeros, with zero gradients. Keys and
    values that no query sees must still be finite numbers.

    Args:
      q: (B, T, N, H), floating.
      k, v: (B, S, K, H) of q's dtype, or bfloat16 under float32 queries, or int8 with scales, or uint8 (B, S, K, H / 2)
        with scales, whose bytes hold two 4-bit integers (`unpack_halves`); N is a multiple of K, and query head i reads
        kv head i // (N / K).
      k_scale, v_scale: for integers only. Of int8 float32 (B, S, K): a cache's value is `k * k_scale[..., None]`. Of
        4-bit integers bfloat16 (B, S, K, 2), one for each half of a head.
      q_positions, kv_positions: int32 (B, T) and (B, S). An empty cache slot gets a position above every query's.
      q_segments, kv_segments: int32 (B, T) and (B, S), both or neither.
      window: int below 2**31, the number of positions that a query sees, its own included; None for all before it.
      softcap: scores become `softcap * tanh(scores / softcap)`, after the scale (Gemma 2, 2408.00118). Positive and
        finite in float32.
      scale: factor of the scores, finite in float32; H**-0.5 if None.
      implementation: "reference", "chunked" (memory linear in T and S, its gradient's too), "cpu" (native, float32 and
        bfloat16 queries; chunked where a gradient is taken), "gpu" (fused into kernels, forward and backward: float32
        and bfloat16, H up to 256), "tpu" (the same), or None for the platform's best. These two read a cache of another
        dtype than q's as it is stored, and leave its gradient to chunked; one of 4 bits is widened in front of them,
        and its gradient is theirs.

    Returns:
      (B, T, N, H) in q's dtype. Scores and softmax are float32. Integers have no gradient; their scales do.

    Raises:
      ValueError: shapes, dtypes or options that do not fit together.
    """
    _check_operands(q, k, v)
    _check_scales(k, v, k_scale, v_scale)
    _check_rows("q_positions", q_positions, q.shape[:2])
    _check_rows("kv_positions", kv_positions, k.shape[:2])
    if (q_segments is None) != (kv_segments is None):
        given, lacking = ("kv", "q") if q_segments is None else ("q", "kv")
        raise ValueError(f"{given}_segments given without {lacking}_segments: give both or neither")
    if q_segments is not None and kv_segments is not None:
        _check_rows("q_segments", q_segments, q.shape[:2])
        _check_rows("kv_segments", kv_segments, k.shape[:2])
    check_count("window", window)
    check_softcap(softcap)
    check_factor("scale", scale)
    return run_kernel(
        "attention",
        BACKENDS,
        implementation,
        q,
        k,
        v,
        q_positions,
        kv_positions,
        q_segments,
        kv_segments,
        k_scale,
        v_scale,
        window=window,
        softcap=softcap,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )


def _check_operands(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises ValueError unless q is (B, T, N, H) and floating, and k, v are (B, S, K, H), or half of H bytes, with K
    dividing N, of q's dtype or that of a cache which serves it."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"attention needs q (B, T, N, H) and k (B, S, K, H), got {q.shape} and {k.shape}")
    if k.shape != v.shape:
        raise ValueError(f"k and v differ in shape: {k.shape} and {v.shape}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch {q.shape[0]}, k has batch {k.shape[0]}")
    head_dim = k.shape[3] * (2 if k.dtype == jnp.uint8 else 1)
    if q.shape[3] != head_dim:
        raise ValueError(f"q has head dim {q.shape[3]}, k has head dim {head_dim} ({k.dtype})")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are no multiple of {k.shape[2]} kv heads")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"attention needs floating q, got {q.dtype}")
    caches = [q.dtype, *map(jnp.dtype, SCALES), *([jnp.dtype(jnp.bfloat16)] if q.dtype == jnp.float32 else [])]
    if k.dtype != v.dtype or k.dtype not in caches:
        raise ValueError(
            f"q, k, v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}; k and v may both be "
            + " or ".join(dtype.name for dtype in caches)
        )


def _check_scales(k: jax.Array, v: jax.Array, k_scale: jax.Array | None, v_scale: jax.Array | None) -> None:
    """Raises ValueError unless integer k and v, and no others, have the scales that `SCALES` says."""
    for name, cache, scale in (("k", k, k_scale), ("v", v, v_scale)):
        if (cache.dtype in SCALES) != (scale is not None):
            given = "without" if scale is None else "with"
            raise ValueError(
                f"{name} is {cache.dtype} and comes {given} {name}_scale: int8 and uint8 need one, others have none"
            )
        if scale is None:
            continue
        dtype, each = SCALES[cache.dtype]
        if scale.shape != (*cache.shape[:3], *each):
            raise ValueError(f"{name}_scale has shape {scale.shape}, needs {(*cache.shape[:3], *each)}")
        if scale.dtype != dtype:
            raise ValueError(f"{name}_scale must be {dtype}, got {scale.dtype}")


def _check_rows(name: str, value: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `value` is an int32 array of `shape`."""
    if value.shape != shape:
        raise ValueError(f"{name} has shape {value.shape}, needs {shape}")
    if value.dtype != jnp.int32:
        raise ValueError(f"{name} must be int32, got {value.dtype}")
