"""Native CPU backend of paged attention (kernels/csrc/attention.cc): pages are read where they lie.

A row costs what its own tokens do, whatever the table has room for. Its bits are the same in any company.

Dimensions: B batch, T query, L layers, P pages, R tokens of a page, M pages of a row, N heads, K kv heads, H head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hsai_kernels import native
from hsai_kernels.dispatch import check_platform


def attend_pages_cpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array,
    table: jax.Array,
    q_positions: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    *,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> jax.Array:
    """Softmax attention over the visible tokens; arguments and shapes as in api.py, already validated.

    Weights are float32, for bfloat16 too. A table that names no page where a query looks is an error when the program
    runs. Raises NotImplementedError (or its BackendMissing) for what it does not support.
    """
    check_platform("cpu")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"has q of bfloat16 or float32, not of {q.dtype}")
    if 0 in q.shape or 0 in k.shape or 0 in table.shape:
        raise NotImplementedError(f"has operands that are not empty, not q {q.shape}, k {k.shape}, table {table.shape}")
    native.load_library()
    call = jax.ffi.ffi_call(native.PAGED_ATTENTION, jax.ShapeDtypeStruct(q.shape, q.dtype))
    result: jax.Array = call(
        q,
        k,
        v,
        layer,
        table,
        q_positions,
        *(jnp.zeros(0, jnp.float32) if scales is None else scales for scales in (k_scale, v_scale)),
        window=np.int64(window or 0),
        softcap=np.float32(softcap or 0.0),
        scale=np.float32(scale),
    )
    return result
