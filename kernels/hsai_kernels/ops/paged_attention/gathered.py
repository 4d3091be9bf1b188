"""Attention over pages in plain jax: a row's pages are copied side by side, and an attention over rows does the rest.

With the reference it is the meaning of the kernel; with the kernels of accelerators, what these have. It costs a copy
of all pages that the table names, however short the rows are.

B batch, T query, L layers, P pages, R tokens of a page, M pages of a row, S = M * R, N heads, K kv heads, H head dim.
"""

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import Backend


def gather_for(attend: Backend) -> Backend:
    """The backend of `paged_attention` that does its arithmetic by a backend of `attention`."""

    def attend_pages(
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
        slots = table.shape[1] * k.shape[2]
        kv_positions = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (table.shape[0], slots))
        # Behind the last query anything may lie, numbers that are none included, and a weight of 0 would not hide them.
        used = kv_positions <= jnp.max(q_positions, axis=1, keepdims=True)

        def gather(pages: jax.Array) -> jax.Array:
            rows = pages.at[layer, table].get(mode="clip").reshape(table.shape[0], slots, *pages.shape[3:])
            rows = jnp.where(used.reshape(*used.shape, *(1,) * (rows.ndim - 2)), rows, jnp.zeros((), rows.dtype))
            return jax.lax.bitcast_convert_type(rows, jnp.bfloat16) if rows.dtype == jnp.uint16 else rows

        scales = [None if scales is None else gather(scales) for scales in (k_scale, v_scale)]
        at = (q_positions, kv_positions, None, None)
        return attend(q, gather(k), gather(v), *at, *scales, window=window, softcap=softcap, scale=scale)

    return attend_pages
