"""The key/value cache of many rows in pages that they share: rows grow page by page, and equal beginnings lie once.

Who holds which page is decided elsewhere (`hsai.infer.pages`); here a table says it. Formats are those of cache.py.

L layers, P pages, R tokens of a page, B batch, M pages of a row, K kv heads, H head dim, T new tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from hsai.models.cache import KVCache, StoredArrays, put_tokens
from hsai_kernels import paged_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Rows in pages: token s of row b lies at place s % R of page `table[b, s // R]`, of every layer.

    Every token comes with its position. One at position -1 is nobody's: it is written nowhere, and sees nothing.
    """

    pages: KVCache
    """(L, P, R, K, H): a cache with a row for each page; its lengths mean nothing."""

    table: jax.Array
    """int32 (B, M). Entries that are no page, such as P, take nothing in."""

    @property
    def stored(self) -> StoredArrays:
        """The state of the pages."""
        return self.pages.stored

    def follow(self, tokens: int) -> jax.Array:
        """Raises TypeError: a row does not know its length."""
        raise TypeError("a paged cache needs the positions of its tokens")

    def view(self, stored: StoredArrays, layer: jax.Array) -> "LayerPages":
        """As of `hsai.models.cache.Cache`."""
        return LayerPages(stored, layer, self.table)

    def advance(self, stored: StoredArrays, tokens: int) -> "PagedCache":
        """As of `hsai.models.cache.Cache`."""
        return PagedCache(KVCache.from_stored(stored, self.pages.lengths), self.table)


@dataclasses.dataclass(frozen=True)
class LayerPages:
    """One layer's view of pages."""

    stored: StoredArrays
    layer: jax.Array
    table: jax.Array

    def write(self, keys: jax.Array, values: jax.Array, positions: jax.Array) -> "LayerPages":
        """Stores (B, T, K, H) keys and values at `positions` (B, T); positions outside of the table are dropped."""
        pages, size = self.stored[0].shape[1:3]
        inside = (positions >= 0) & (positions < self.table.shape[1] * size)
        page = jnp.take_along_axis(self.table, positions // size, axis=1, mode="clip")
        page = jnp.where(inside & (page >= 0), page, pages)  # a negative index would count from the end
        at = (self.layer, page, positions % size)
        return LayerPages(put_tokens(self.stored, keys, values, at), self.layer, self.table)

    def attend(self, q: jax.Array, positions: jax.Array, *, window: int | None, scale: float | None) -> jax.Array:
        """As of `hsai.models.cache.LayerView`."""
        keys, values, key_scales, value_scales = self.stored
        return paged_attention(
            q,
            keys,
            values,
            k_scale=key_scales,
            v_scale=value_scales,
            layer=self.layer,
            table=self.table,
            q_positions=positions,
            window=window,
            scale=scale,
        )
