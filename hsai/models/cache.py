"""The key/value cache of a decoder: one array of keys and one of values for all layers.

L layers, B batch, S slots, K kv heads, H head dim, T new tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from hsai.sharding import Axes

CACHE_AXES: Axes = ("layers", "batch", "cache", "kv_heads", "head_dim")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """keys, values (L, B, S, K, H); lengths int32 (B,): how many slots of each row hold tokens.

    Slot s of a row holds the token at position s. What lies at or beyond a row's length is never read: its position
    exceeds that of every query.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array

    @property
    def slots(self) -> int:
        """S: how many tokens a row can hold."""
        return self.keys.shape[2]


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's view of a cache that is carried through the scan over layers, so that writes happen in place."""

    keys: jax.Array
    values: jax.Array
    layer: jax.Array

    def write(self, keys: jax.Array, values: jax.Array, positions: jax.Array) -> "LayerCache":
        """Stores (B, T, K, H) keys and values at `positions` (B, T); positions beyond the last slot are dropped."""
        rows = jnp.arange(positions.shape[0])[:, None]
        at = (self.layer, rows, positions)
        return LayerCache(
            self.keys.at[at].set(keys.astype(self.keys.dtype), mode="drop"),
            self.values.at[at].set(values.astype(self.values.dtype), mode="drop"),
            self.layer,
        )

    def read(self) -> tuple[jax.Array, jax.Array]:
        """This layer's keys and values, (B, S, K, H) each."""
        return self.keys[self.layer], self.values[self.layer]
