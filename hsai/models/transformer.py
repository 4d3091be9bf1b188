"""The decoder: covers Llama 3, Qwen 3, SmolLM2 and Mistral by configuration.

B batch, T query, D embed, V vocabulary, L layers.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hsai.errors import InputError
from hsai.formats import lookup, project
from hsai.models.attention import Attention
from hsai.models.cache import CacheFormat, KVCache, LayerCache, StoredArrays, make_cache
from hsai.models.layers import RMSNorm, declare
from hsai.models.mlp import Mlp
from hsai.models.rope import RopeConfig, Rotation, make_rotation
from hsai.sharding import constrain

Remat = Literal["none", "dots", "full"]
# What the scan over layers hands on: activations, and the keys and values of all layers where there is a cache.
Carry = tuple[jax.Array, StoredArrays | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder-only transformer."""

    vocab: int
    """Token ids are in [0, vocab)."""

    embed: int
    """Width of the residual stream."""

    layers: int
    """Blocks of attention and feed-forward."""

    heads: int
    """Query heads."""

    kv_heads: int
    """Key and value heads; each serves heads / kv_heads query heads."""

    head_dim: int
    """Width of a head."""

    mlp: int
    """Width of the feed-forward block."""

    max_length: int
    """Longest context in tokens, for which caches and exported graphs are made."""

    activation: Literal["silu", "gelu"] = "silu"
    """Gate of the feed-forward block: SwiGLU or GeGLU."""

    norm_eps: float = 1e-5
    """Added to the mean square in each normalization."""

    qk_norm: bool = False
    """Normalizes queries and keys of each head (Qwen 3)."""

    sliding_window: int | None = None
    """A query sees this many positions, its own included (Mistral); none sees all."""

    tie_embeddings: bool = True
    """The output projection is the embedding table."""

    rope: RopeConfig = RopeConfig()
    """Rotary position embedding."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of activations and products; parameters stay float32 while training."""

    def __post_init__(self) -> None:
        for name in ("vocab", "embed", "layers", "heads", "kv_heads", "head_dim", "mlp", "max_length"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.heads % self.kv_heads:
            raise InputError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise InputError(f"model.head_dim={self.head_dim} must be even: rotary embedding turns pairs")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise InputError(f"model.sliding_window={self.sliding_window} must be at least 1, or none")
        if self.norm_eps <= 0:
            raise InputError(f"model.norm_eps={self.norm_eps} must be positive")

    @property
    def axis_sizes(self) -> dict[str, int]:
        """How many units each logical axis of the weights has, for `check_mesh`: heads are whole, not their widths."""
        return {name: getattr(self, name) for name in ("embed", "heads", "kv_heads", "mlp", "vocab")}


class Block(nnx.Module):
    """Attention and feed-forward, each on a normalized copy of the residual stream."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.embed, config.norm_eps, axis="embed")
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed, config.norm_eps, axis="embed")
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        rotation: Rotation,
        segments: jax.Array | None,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """(B, T, D) -> (B, T, D), and the cache with this block's keys and values written to it."""
        y, cache = self.attention(self.attention_norm(x), positions, rotation, segments, cache)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class Transformer(nnx.Module):
    """Embedding, a scan over stacked blocks, a last normalization, and the projection to logits."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        # A tied table also projects to logits: this deviation gives logits of order one, and the first normalization
        # makes the blocks blind to the scale of what they read.
        self.embed = declare(rngs, (config.embed, config.vocab), ("embed", "vocab"), std=config.embed**-0.5)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.layers = stack(rngs)
        self.final_norm = RMSNorm(config.embed, config.norm_eps, axis="embed")
        if not config.tie_embeddings:
            shape, std = (config.embed, config.vocab), config.embed**-0.5
            self.unembed = declare(rngs, shape, ("embed", "vocab"), std=std)
        self.config = config

    @property
    def head(self) -> nnx.Param:
        """The weight (D, V) that projects hidden states to logits."""
        return self.embed if self.config.tie_embeddings else self.unembed

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: KVCache | None = None,
        remat: Remat = "none",
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states of `tokens`: for training without a cache, for prefill and decoding with one.

        Args:
          tokens: (B, T) int32 in [0, V).
          positions: (B, T) int32; by default tokens follow one another from 0, or from the end of the cache's rows.
          segments: (B, T) int32, for packed documents; excludes `cache`.
          cache: tokens read before; the T new ones are written behind each row's length.
          remat: what the backward pass recomputes: nothing, all but matrix products, or everything in a block.
        Returns: (B, T, D) in the config's dtype, normalized, for `logits`; and the cache, T tokens longer.
        """
        if segments is not None and cache is not None:
            raise ValueError("segments and cache exclude each other: a cached row is one document")
        if positions is None:
            start = jnp.zeros((), jnp.int32) if cache is None else cache.lengths[:, None]
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        dtype = jnp.dtype(self.config.dtype)
        x = lookup(self.embed.get_value(), tokens, dtype=dtype, out_axes=("batch", "seq", "embed"))

        rotation = make_rotation(positions, self.config.rope, self.config.head_dim)

        def step(carry: Carry, scanned: tuple[Block, jax.Array]) -> tuple[Carry, None]:
            x, stored = carry
            block, layer = scanned
            view = None if stored is None else LayerCache(stored, layer)
            x, view = block(x, positions, rotation, segments, view)
            x = constrain(x, "batch", "seq", "embed")
            return (x, None if view is None else view.stored), None

        if remat != "none":
            policies = jax.checkpoint_policies
            saveable = policies.dots_with_no_batch_dims_saveable if remat == "dots" else policies.nothing_saveable
            step = jax.checkpoint(step, policy=saveable, prevent_cse=False)
        carry: Carry = (x, None if cache is None else cache.stored)
        (x, stored), _ = jax.lax.scan(step, carry, (self.layers, jnp.arange(self.config.layers)))
        if cache is not None and stored is not None:
            cache = KVCache.from_stored(stored, cache.lengths + tokens.shape[1])
        return self.final_norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(B, T, D) -> (B, T, V) in float32."""
        axes = ("batch", "seq", "vocab")
        return project(hidden, self.head.get_value(), out_axes=axes, in_axis="embed", out_dtype=jnp.float32)

    def make_cache(self, batch: int, slots: int | None = None, format: CacheFormat = "activations") -> KVCache:
        """An empty cache of `slots` tokens a row (default: the longest context), laid out like activations.

        Raises:
          InputError: an unknown format.
        """
        c = self.config
        slots = slots or c.max_length
        return make_cache(c.layers, batch, slots, c.kv_heads, c.head_dim, dtype=c.dtype, format=format)


def abstract_transformer(config: TransformerConfig) -> Transformer:
    """The model with shapes in place of arrays: for shardings, checkpoints and counting, at no cost."""
    return jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
