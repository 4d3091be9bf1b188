"""`paged_attention`: attention over a cache whose tokens lie in pages, found through a table.

A page holds some consecutive tokens of one layer after the other; a row's tokens lie in the pages that its line of the
table names, in order, so that rows grow page by page and rows with the same beginning share it (PagedAttention: Kwon et
al. 2023, 2309.06180). All layers lie in one array: a layer is read where it lies, and never cut out.

Dimensions: B batch, T query, L layers, P pages, R tokens of a page, M pages of a row, N heads, K kv heads, H head dim.
"""

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import Backend, load_later, run_kernel
from hsai_kernels.ops.attention.api import SCALES
from hsai_kernels.ops.attention.chunked import attention_chunked
from hsai_kernels.ops.attention.reference import attention_reference
from hsai_kernels.ops.paged_attention.cpu import attend_pages_cpu
from hsai_kernels.ops.paged_attention.gathered import gather_for
from hsai_kernels.options import check_count, check_factor, check_softcap

BACKENDS: dict[str, Backend] = {
    "chunked": gather_for(attention_chunked),
    "cpu": attend_pages_cpu,
    "gpu": gather_for(load_later("hsai_kernels.ops.attention.gpu", "attention_gpu")),
    "reference": gather_for(attention_reference),
    "tpu": gather_for(load_later("hsai_kernels.ops.attention.tpu", "attention_tpu")),
}


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    layer: jax.Array,
    table: jax.Array,
    q_positions: jax.Array,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention of each query over the tokens of its row at its own position and before.

    Token s of row b is `k[layer, table[b, s // R], s % R]`. A query sees it iff `s <= q_position`, and (with a window)
    `q_position - s < window`. A query that sees no token, such as one at position -1, gives zeros. What lies behind the
    last query of a row may be anything, and so may the table's entries there.

    Args:
      q: (B, T, N, H), floating.
      k, v: (L, P, R, K, H) of q's dtype, bfloat16, or int8 with scales; or uint8 (L, P, R, K, H / 2) with scales, which
        holds integers of 4 bits; as of `hsai_kernels.attention`.
      k_scale, v_scale: for integers only: float32 (L, P, R, K); of 4 bits bfloat16 (L, P, R, K, 2).
        Wherever these are bfloat16 they may also be uint16, its bit patterns: XLA writes these in place on a CPU.
      layer: int32 (), in [0, L).
      table: int32 (B, M), in [0, P) up to the last page that a query sees.
      q_positions: int32 (B, T), below M * R.
      window, softcap, scale: as of `hsai_kernels.attention`.
      implementation: "cpu" (native), or what reads the pages side by side by a backend of `attention`: "reference",
        "chunked", "gpu", "tpu"; None for the platform's best. The native one has no gradient: it raises
        ValueError where one is taken.

    Returns:
      (B, T, N, H) in q's dtype.

    Raises:
      ValueError: shapes, dtypes or options that do not fit together.
    """
    _check_pages(q, k, v, k_scale, v_scale)
    if table.ndim != 2 or table.shape[0] != q.shape[0] or table.dtype != jnp.int32:
        raise ValueError(f"table must be int32 ({q.shape[0]}, pages of a row), got {table.dtype}{table.shape}")
    if q_positions.shape != q.shape[:2] or q_positions.dtype != jnp.int32:
        raise ValueError(f"q_positions must be int32 {q.shape[:2]}, got {q_positions.dtype}{q_positions.shape}")
    if layer.shape != () or layer.dtype != jnp.int32:
        raise ValueError(f"layer must be an int32 scalar, got {layer.dtype}{layer.shape}")
    check_count("window", window)
    check_softcap(softcap)
    check_factor("scale", scale)
    return run_kernel(
        "paged_attention",
        BACKENDS,
        implementation,
        q,
        k,
        v,
        layer,
        table,
        q_positions,
        k_scale,
        v_scale,
        window=window,
        softcap=softcap,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )


def _check_pages(
    q: jax.Array, k: jax.Array, v: jax.Array, k_scale: jax.Array | None, v_scale: jax.Array | None
) -> None:
    """Raises ValueError unless q is (B, T, N, H), and k, v and their scales are pages that serve it."""
    if q.ndim != 4 or k.ndim != 5:
        raise ValueError(f"paged_attention needs q (B, T, N, H) and k (L, P, R, K, H), got {q.shape} and {k.shape}")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"paged_attention needs floating q, got {q.dtype}")
    if k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(f"k and v differ: {k.dtype}{k.shape} and {v.dtype}{v.shape}")
    head_dim = k.shape[4] * (2 if k.dtype == jnp.uint8 else 1)
    if head_dim != q.shape[3]:
        raise ValueError(f"q has head dim {q.shape[3]}, k has head dim {head_dim} ({k.dtype})")
    if k.shape[3] == 0 or q.shape[2] % k.shape[3]:
        raise ValueError(f"{q.shape[2]} query heads are no multiple of {k.shape[3]} kv heads")
    valid = [*dict.fromkeys((q.dtype, *map(jnp.dtype, (jnp.bfloat16, jnp.uint16)), *SCALES))]
    if k.dtype not in valid:
        named = ", ".join(dtype.name for dtype in valid)
        raise ValueError(f"k and v are {k.dtype}; under {q.dtype} queries they may be {named}")
    for name, stored, scales in (("k", k, k_scale), ("v", v, v_scale)):
        if (stored.dtype in SCALES) != (scales is not None):
            given = "without" if scales is None else "with"
            raise ValueError(f"{name} is {stored.dtype} and comes {given} scales: integers need them, others have none")
        if scales is None:
            continue
        dtype, each = SCALES[stored.dtype]
        fits = scales.dtype == dtype or (dtype == "bfloat16" and scales.dtype == jnp.uint16)
        if scales.shape != (*stored.shape[:4], *each) or not fits:
            raise ValueError(
                f"{name}_scale must be {dtype}{(*stored.shape[:4], *each)}, got {scales.dtype}{scales.shape}"
            )
