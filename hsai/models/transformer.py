"""The decoder: covers Llama 3, SmolLM2, Mistral, Mixtral, Qwen 2.5 and 3 (dense, experts), Gemma 3 by configuration.

B batch, T query, D embed, V vocabulary, L layers.
"""

import dataclasses
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from hsai.errors import InputError
from hsai.formats import lookup, project, scan_layers
from hsai.models.attention import Attention
from hsai.models.cache import Cache, CacheFormat, KVCache, LayerView, StoredArrays, make_cache
from hsai.models.layers import RMSNorm, declare
from hsai.models.mlp import Activation, Mlp
from hsai.models.moe import MoE, MoEConfig
from hsai.models.rope import RopeConfig, Rotation, make_rotation
from hsai.sharding import constrain
from hsai_kernels.options import LARGEST, SMALLEST

Remat = Literal["none", "dots", "full"]
C = TypeVar("C", bound=Cache)
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
    """Width of the feed-forward block; of each expert, where `moe` says that there are several."""

    max_length: int
    """Longest context in tokens, for which caches and exported graphs are made."""

    activation: Activation = "silu"
    """Gate of the feed-forward block: SwiGLU or GeGLU."""

    norm_eps: float = 1e-5
    """Added to the mean square in each normalization."""

    norm_plus_one: bool = False
    """Normalizations multiply by 1 + their stored gain (Gemma)."""

    post_norm: bool = False
    """Normalizes also what a block's attention and feed-forward give, before it is added (Gemma 2 and 3)."""

    qk_norm: bool = False
    """Normalizes queries and keys of each head (Qwen 3, Gemma 3)."""

    qkv_bias: bool = False
    """Adds a learned bias to queries, keys and values (Qwen 2.5)."""

    query_scalar: int | None = None
    """Scores are divided by the root of this (Gemma's query_pre_attn_scalar); none takes head_dim."""

    sliding_window: int | None = None
    """A query sees this many positions, its own included (Mistral); none sees all."""

    global_every: int | None = None
    """Every this many-th layer sees all positions whatever the window is (Gemma 3: 6); none: no layer does."""

    scale_embeddings: bool = False
    """Embedded tokens are multiplied by the root of `embed` (Gemma)."""

    moe: MoEConfig | None = None
    """Experts in the place of each feed-forward block (Mixtral, Qwen 3 MoE); none has a single one."""

    tie_embeddings: bool = True
    """The output projection is the embedding table."""

    rope: RopeConfig = RopeConfig()
    """Rotary position embedding."""

    local_rope: RopeConfig | None = None
    """Of the layers with a window, where others are global (Gemma 3); none takes `rope`."""

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
        if self.global_every is not None and (self.global_every < 2 or self.sliding_window is None):
            raise InputError(
                f"model.global_every={self.global_every} must be at least 2, and needs a model.sliding_window, "
                f"which is {self.sliding_window}"
            )
        if self.local_rope is not None and self.global_every is None:
            raise InputError("model.local_rope is for layers beside global ones: it needs model.global_every")
        if self.query_scalar is not None and self.query_scalar < 1:
            raise InputError(f"model.query_scalar={self.query_scalar} must be at least 1, or none")
        if not SMALLEST <= self.norm_eps <= LARGEST:
            raise InputError(f"model.norm_eps={self.norm_eps} must be positive, and in float32 neither 0 nor infinite")

    @property
    def axis_sizes(self) -> dict[str, int]:
        """How many units each logical axis of the weights has, for `check_mesh`: heads are whole, not their widths."""
        sizes = {name: getattr(self, name) for name in ("embed", "heads", "kv_heads", "mlp", "vocab")}
        if self.moe is not None:  # experts are split in the place of their width
            sizes["experts"] = self.moe.experts
            del sizes["mlp"]
        return sizes

    def is_global(self, layer: int) -> bool:
        """Whether a layer sees all positions."""
        return self.sliding_window is None or (self.global_every is not None and (layer + 1) % self.global_every == 0)


class Block(nnx.Module):
    """Attention and feed-forward, each on a normalized copy of the residual stream."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        def norm() -> RMSNorm:
            return RMSNorm(config.embed, config.norm_eps, axis="embed", plus_one=config.norm_plus_one)

        self.attention_norm = norm()
        self.attention = Attention(config, rngs=rngs)
        self.attention_post_norm = norm() if config.post_norm else None
        self.mlp_norm = norm()
        self.mlp = Mlp(config, rngs=rngs) if config.moe is None else MoE(config, config.moe, rngs=rngs)
        self.mlp_post_norm = norm() if config.post_norm else None

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        rotation: Rotation,
        segments: jax.Array | None,
        cache: LayerView | None,
        is_global: jax.Array | None = None,
        counted: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerView | None, jax.Array | None]:
        """(B, T, D) -> (B, T, D); the cache with this block's keys and values written to it; and the imbalance of its
        experts over the tokens that are `counted`, where it has experts and is told those."""
        y, cache = self.attention(self.attention_norm(x), positions, rotation, segments, cache, is_global)
        x = x + (y if self.attention_post_norm is None else self.attention_post_norm(y))
        normed = self.mlp_norm(x)
        y = self.mlp(normed)
        imbalance = None
        if counted is not None and isinstance(self.mlp, MoE):
            imbalance = self.mlp.imbalance(normed, counted)
        return x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y)), cache, imbalance


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
        self.final_norm = RMSNorm(config.embed, config.norm_eps, axis="embed", plus_one=config.norm_plus_one)
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
        cache: C | None = None,
        remat: Remat = "none",
    ) -> tuple[jax.Array, C | None]:
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
        hidden, cache, _ = self._read(tokens, positions, segments, cache, None, remat)
        return hidden, cache

    def read_counted(
        self,
        tokens: jax.Array,
        counted: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        remat: Remat = "none",
    ) -> tuple[jax.Array, jax.Array | None]:
        """Hidden states for training, and what each layer's experts have to do.

        Args:
          counted: float32 (B, T), the weight of each token in the imbalance.
          tokens, positions, segments, remat: as of `__call__`.
        Returns: the hidden states of `__call__`; and `MoE.imbalance` of each layer, float32 (L,), or None of a model
          without experts.
        """
        hidden, _, imbalances = self._read(tokens, positions, segments, None, counted, remat)
        return hidden, imbalances

    def _read(
        self,
        tokens: jax.Array,
        positions: jax.Array | None,
        segments: jax.Array | None,
        cache: C | None,
        counted: jax.Array | None,
        remat: Remat,
    ) -> tuple[jax.Array, C | None, jax.Array | None]:
        if positions is None:
            length = tokens.shape[1]
            positions = jnp.arange(length, dtype=jnp.int32) if cache is None else cache.follow(length)
            positions = jnp.broadcast_to(positions, tokens.shape)
        x = self.embed_tokens(tokens)
        rotations = self.make_rotations(positions)

        def step(carry: Carry, scanned: tuple[Block, jax.Array]) -> tuple[Carry, jax.Array | None]:
            x, stored = carry
            block, layer = scanned
            view = None if cache is None or stored is None else cache.view(stored, layer)
            x, view, imbalance = self.apply_block(block, layer, x, positions, rotations, segments, view, counted)
            return (x, None if view is None else view.stored), imbalance

        if remat != "none":
            policies = jax.checkpoint_policies
            saveable = policies.dots_with_no_batch_dims_saveable if remat == "dots" else policies.nothing_saveable
            step = jax.checkpoint(step, policy=saveable, prevent_cse=False)
        carry: Carry = (x, None if cache is None else cache.stored)
        in_place = cache is not None
        (x, stored), imbalances = scan_layers(step, carry, self.layers, self.config.layers, in_place=in_place)
        if cache is not None and stored is not None:
            cache = cache.advance(stored, tokens.shape[1])
        return self.final_norm(x), cache, imbalances

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """What the first block reads: (B, T) int32 -> (B, T, D) in the config's dtype."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        x = lookup(self.embed.get_value(), tokens, dtype=dtype, out_axes=("batch", "seq", "embed"))
        return x * jnp.asarray(c.embed**0.5, dtype) if c.scale_embeddings else x

    def make_rotations(self, positions: jax.Array) -> tuple[Rotation, Rotation]:
        """Of global layers and of those with a window, which mostly are the same."""
        c = self.config
        far = make_rotation(positions, c.rope, c.head_dim)
        return far, far if c.local_rope is None else make_rotation(positions, c.local_rope, c.head_dim)

    def apply_block(
        self,
        block: Block,
        layer: jax.Array,
        x: jax.Array,
        positions: jax.Array,
        rotations: tuple[Rotation, Rotation],
        segments: jax.Array | None = None,
        view: LayerView | None = None,
        counted: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerView | None, jax.Array | None]:
        """One layer: `block` holds the weights of number `layer`, int32 (); the rest as for `Block`."""
        far, near = rotations
        is_global, rotation = None, far
        if self.config.global_every is not None:
            is_global = (layer + 1) % self.config.global_every == 0
            rotation = jax.tree.map(lambda a, b: jnp.where(is_global, a, b), far, near)
        x, view, imbalance = block(x, positions, rotation, segments, view, is_global, counted)
        return constrain(x, "batch", "seq", "embed"), view, imbalance

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
