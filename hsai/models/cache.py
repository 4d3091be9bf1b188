"""The key/value cache of a decoder whose rows lie in slots of their own (paged.py has rows in shared pages).

There is one array of keys and one of values for all layers.

What a cached number is stored as is the deployer's choice (`CacheFormat`): decoding over a long context reads the whole
cache for each token, so its bytes are time. Attention reads a cache as it is stored; nothing here widens it.

L layers, B batch, S slots, K kv heads, H head dim, T new tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol, Self, get_args

import jax
import jax.numpy as jnp

from hsai.errors import InputError
from hsai.formats.packed import invert_scale
from hsai.models.heads import attend_heads
from hsai.sharding import Axes, constrain
from hsai_kernels import pack_halves

CACHE_AXES: Axes = ("layers", "batch", "cache", "kv_heads", "head_dim")

CacheFormat = Literal["activations", "bfloat16", "int8", "int4"]
"""The activations' dtype; bfloat16; int8 codes with a float32 scale for each token and kv head (8 + 32 / H bits a
number); or 4-bit codes, two a byte, with a bfloat16 scale for each half of a head (4 + 32 / H bits)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """keys, values (L, B, S, K, H); lengths int32 (B,): how many slots of each row hold tokens.

    Slot s of a row holds the token at position s. What lies at or beyond a row's length is never read: its position
    exceeds that of every query. An int8 cache has scales, float32 (L, B, S, K), for `keys * key_scales[..., None]`. An
    int4 cache has keys and values of uint8 (L, B, S, K, H / 2), whose bytes `hsai_kernels.unpack_halves` splits, and
    scales, bfloat16 (L, B, S, K, 2), of these halves.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None

    @property
    def slots(self) -> int:
        """S: how many tokens a row can hold."""
        return self.keys.shape[2]

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """Those that there are, in the order of the fields: `KVCache(*cache.arrays)` is the cache."""
        return tuple(jax.tree.leaves(self))

    @property
    def stored(self) -> "StoredArrays":
        """What the layers read and write; bfloat16 as bit patterns, uint16."""
        stored: StoredArrays = jax.tree.map(_as_bits, (self.keys, self.values, self.key_scales, self.value_scales))
        return stored

    def follow(self, tokens: int) -> jax.Array:
        """As of `Cache`."""
        return self.lengths[:, None] + jnp.arange(tokens, dtype=jnp.int32)

    def view(self, stored: "StoredArrays", layer: jax.Array) -> "LayerCache":
        """As of `Cache`."""
        return LayerCache(stored, layer)

    def advance(self, stored: "StoredArrays", tokens: int) -> "KVCache":
        """As of `Cache`."""
        return KVCache.from_stored(stored, self.lengths + tokens)

    @classmethod
    def from_stored(cls, stored: "StoredArrays", lengths: jax.Array) -> "KVCache":
        """The inverse of `stored`."""
        keys, values, *scales = jax.tree.map(_from_bits, stored)
        return cls(keys, values, lengths, *scales)


StoredArrays = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]
"""keys, values, and the scales of a cache of integers."""


class Cache(Protocol):
    """What a model asks of a cache, wherever its tokens lie."""

    @property
    def stored(self) -> StoredArrays:
        """The state that the scan over layers hands on."""

    def follow(self, tokens: int) -> jax.Array:
        """Positions (B, tokens) behind what each row holds."""

    def view(self, stored: StoredArrays, layer: jax.Array) -> "LayerView":
        """One layer of this cache, of which `stored` is the state."""

    def advance(self, stored: StoredArrays, tokens: int) -> Self:
        """This cache with another state, to which each row's next `tokens` were written."""


class LayerView(Protocol):
    """What attention asks of one layer of a `Cache`."""

    @property
    def stored(self) -> StoredArrays:
        """The state of all layers, which the scan over them hands on."""

    def write(self, keys: jax.Array, values: jax.Array, positions: jax.Array) -> Self:
        """Stores (B, T, K, H) keys and values of the tokens at `positions` (B, T)."""

    def attend(self, q: jax.Array, positions: jax.Array, *, window: int | None, scale: float | None) -> jax.Array:
        """Attention of queries (B, T, N, H) at `positions` (B, T) over what is stored; (B, T, N, H)."""


def make_cache(
    layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, *, dtype: str, format: CacheFormat
) -> KVCache:
    """An empty cache, laid out like activations of `dtype`.

    Raises:
      InputError: an unknown format.
    """
    check_cache_format(format)
    heads = (layers, batch, slots, kv_heads)
    # Arrays, not one several times: a step that takes over the cache's memory must find memory for each.
    shapes: Sequence[tuple[tuple[int, ...], str]]
    match format:
        case "int8":
            shapes = [((*heads, head_dim), "int8")] * 2 + [(heads, "float32")] * 2
        case "int4":
            shapes = [((*heads, head_dim // 2), "uint8")] * 2 + [((*heads, 2), "bfloat16")] * 2
        case _:
            shapes = [((*heads, head_dim), dtype if format == "activations" else format)] * 2
    keys, values, *scales = (constrain(jnp.zeros(shape, stored), *CACHE_AXES[: len(shape)]) for shape, stored in shapes)
    return KVCache(keys, values, jnp.zeros((batch,), jnp.int32), *scales)


def check_cache_format(format: str) -> None:
    """Raises `InputError` for a name that is no `CacheFormat`."""
    if format not in get_args(CacheFormat):
        raise InputError(f"cache={format!r} is unknown; valid are {', '.join(get_args(CacheFormat))}")


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's view of a cache that is carried through the scan over layers, so that writes happen in place."""

    stored: StoredArrays
    layer: jax.Array

    def write(self, keys: jax.Array, values: jax.Array, positions: jax.Array) -> "LayerCache":
        """Stores (B, T, K, H) keys and values at `positions` (B, T); positions beyond the last slot are dropped."""
        rows = jnp.arange(positions.shape[0])[:, None]
        return LayerCache(put_tokens(self.stored, keys, values, (self.layer, rows, positions)), self.layer)

    def attend(self, q: jax.Array, positions: jax.Array, *, window: int | None, scale: float | None) -> jax.Array:
        """As of `LayerView`."""
        k, v, k_scale, v_scale = self.read()
        return attend_heads(
            q,
            k,
            v,
            k_scale=k_scale,
            v_scale=v_scale,
            q_positions=positions,
            kv_positions=jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2]),
            window=window,
            scale=scale,
        )

    def read(self) -> StoredArrays:
        """This layer's keys and values (B, S, K, H) as they are stored, and their scales (B, S, K) if there are any."""
        read: StoredArrays = jax.tree.map(lambda stored: _from_bits(stored[self.layer]), self.stored)
        return read


def put_tokens(stored: StoredArrays, keys: jax.Array, values: jax.Array, at: tuple[Any, ...]) -> StoredArrays:
    """Stores (B, T, K, H) keys and values, in the format of `stored`, at indices of its first axes; what lies outside
    is dropped."""

    def put(stored: jax.Array, new: jax.Array) -> jax.Array:
        new = _as_bits(new.astype(jnp.bfloat16)) if stored.dtype == jnp.uint16 else new.astype(stored.dtype)
        return stored.at[at].set(new, mode="drop")

    stored_keys, stored_values, key_scales, value_scales = stored
    if key_scales is not None and value_scales is not None:
        quantize = quantize_halves if stored_keys.dtype == jnp.uint8 else quantize_heads
        keys, new_key_scales = quantize(keys)
        values, new_value_scales = quantize(values)
        key_scales, value_scales = put(key_scales, new_key_scales), put(value_scales, new_value_scales)
    return put(stored_keys, keys), put(stored_values, values), key_scales, value_scales


def _as_bits(x: jax.Array) -> jax.Array:
    """bfloat16 as uint16, others as they are: XLA:CPU scatters and slices bfloat16 by way of a float32 copy of all."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_bits(x: jax.Array) -> jax.Array:
    """The inverse of `_as_bits`."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def quantize_heads(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(B, T, K, H) of any float dtype -> int8 codes in [-127, 127], and their float32 scales (B, T, K), max|x| / 127.

    Rounded once, when a token is written: each number is off by at most half of its scale.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127.0
    codes = jnp.clip(jnp.round(x * invert_scale(scale)[..., None]), -127, 127)
    return codes.astype(jnp.int8), scale


def quantize_halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(B, T, K, H) of any float dtype -> 4-bit codes, two a byte, uint8 (B, T, K, H / 2), and bfloat16 (B, T, K, 2).

    The number of largest magnitude in each half of a head is level -8 of its scale, which is negative where that number
    is positive: all sixteen levels are used, and a step is an eighth of it, where one of -7 to 7 is a seventh. A number
    is off by half a step at most; one of the other sign, for which the levels end at 7, by a step. (Halves, since a
    byte then has one number of each, and kernels read both without moving one.)
    """
    *lead, width = x.shape
    halves = x.astype(jnp.float32).reshape(*lead, 2, width // 2)
    at = jnp.argmax(jnp.abs(halves), axis=-1, keepdims=True)
    scale = (jnp.take_along_axis(halves, at, axis=-1)[..., 0] / -8.0).astype(jnp.bfloat16)
    codes = jnp.clip(jnp.round(halves * invert_scale(scale)[..., None]), -8, 7)
    return pack_halves(codes.astype(jnp.int8)), scale
