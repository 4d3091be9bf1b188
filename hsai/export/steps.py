"""What a runtime calls: prefill and decode, as functions of flat arrays only.

The same two functions are traced for this machine by `hsai.infer` and exported by `hsai.export.stablehlo`. Weights come
in as one `{name: array}` dict, with the names of weights.safetensors, since an exported graph knows no class of ours;
the cache comes in and goes out as its three arrays, or five where it is of integers.

L layers, B batch, T query, S slots of the cache, K kv heads, H head dim, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hsai.formats.storage import restore
from hsai.models import CacheFormat, KVCache, Transformer, TransformerConfig
from hsai.models.transformer import abstract_transformer

Arrays = Mapping[str, jax.Array]
State = tuple[jax.Array, ...]
"""keys and values as the cache stores them, lengths int32 (B,); of a cache of integers also the scales of keys and of
values: see `hsai.models.cache.KVCache`."""

CACHE_NAMES = tuple(field.name for field in dataclasses.fields(KVCache))
PREFILL_INPUTS = ("weights", "tokens", "count", *CACHE_NAMES)
DECODE_INPUTS = ("weights", "tokens", *CACHE_NAMES)
OUTPUTS = ("logits", *CACHE_NAMES)
"""The last two of each are there for a cache of integers only."""


def make_prefill(config: TransformerConfig, formats: Mapping[str, Mapping[str, Any]]) -> Callable[..., Any]:
    """The prefill step of a model whose weights have `formats` (`hsai.formats.storage.describe`)."""

    def prefill(
        weights: Arrays,
        tokens: jax.Array,
        count: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        lengths: jax.Array,
        key_scales: jax.Array | None = None,
        value_scales: jax.Array | None = None,
    ) -> tuple[jax.Array, *State]:
        """Reads the first `count` tokens of each row behind what the cache holds.

        Tokens from `count` on are padding: what they leave in the cache lies beyond the row's new length, where no
        query looks before the tokens to come have overwritten it. So a long prompt is read by one call after the
        other. A row must not grow beyond its slots: what does not fit is dropped.

        Args:
          weights: by name.
          tokens: int32 (B, T).
          count: int32 (B,), in [0, T].
          keys, values, lengths, key_scales, value_scales: the cache.
        Returns: float32 (B, V) logits of what follows each row's last token (arbitrary where count is 0); the cache.
        """
        model = restore(abstract_transformer(config), formats, weights)
        hidden, cache = _read(model, tokens, KVCache(keys, values, lengths, key_scales, value_scales))
        last = jnp.maximum(count - 1, 0)[:, None, None]
        logits = model.logits(jnp.take_along_axis(hidden, last, axis=1, mode="clip"))[:, 0]
        return logits, *dataclasses.replace(cache, lengths=lengths + count).arrays

    return prefill


def make_decode(config: TransformerConfig, formats: Mapping[str, Mapping[str, Any]]) -> Callable[..., Any]:
    """The decode step of a model whose weights have `formats`."""

    def decode(
        weights: Arrays,
        tokens: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        lengths: jax.Array,
        key_scales: jax.Array | None = None,
        value_scales: jax.Array | None = None,
    ) -> tuple[jax.Array, *State]:
        """Reads one token of each row, int32 (B, 1); returns as prefill."""
        model = restore(abstract_transformer(config), formats, weights)
        hidden, cache = _read(model, tokens, KVCache(keys, values, lengths, key_scales, value_scales))
        return model.logits(hidden)[:, 0], *cache.arrays

    return decode


def _read(model: Transformer, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Hidden states (B, T, D), and the cache with T more tokens in each row."""
    hidden, longer = model(tokens, cache=cache)
    assert longer is not None, "a model that is given a cache returns one"
    return hidden, longer


def cache_shapes(
    config: TransformerConfig, batch: int, slots: int, format: CacheFormat = "activations"
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of the cache's arrays, in the order of CACHE_NAMES.

    Raises:
      InputError: an unknown format.
    """
    return jax.eval_shape(lambda: abstract_transformer(config).make_cache(batch, slots, format)).arrays
