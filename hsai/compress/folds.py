"""Where weights meet: what can be moved from one weight into its neighbours while the model computes the same function.

A normalization multiplies each channel by a gain before products read it; a gated feed-forward block and attention are
linear in `up` and in `v`. So a factor of a channel can move along each of these folds, and a turn of all channels at
once wherever nothing else stands in between.

L layers, E experts, D embed, N heads, K kv heads, H head dim, F ffn.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hsai.models import TransformerConfig

Weights = Mapping[str, jax.Array]
"""Dense weights of a model by their names, layers stacked."""

WRITERS = ("attention.o", "mlp.down")
"""What blocks add to the residual stream comes out of these, by their names within the block."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold:
    """What makes the channels of some products, and these products."""

    source: str
    """A normalization, or a weight whose outputs they are; by its name in the model."""

    readers: tuple[str, ...]
    """Weights that are multiplied by nothing else than these channels."""

    @property
    def is_norm(self) -> bool:
        """Whether the source is a normalization."""
        return self.source.endswith("norm")


def norm_folds(config: TransformerConfig) -> tuple[Fold, ...]:
    """Every normalization of the residual stream; the last one's reader is the head, in a table of its own or not."""
    router = () if config.moe is None else ("mlp.router",)
    blocks = {
        "attention_norm": ("attention.q", "attention.k", "attention.v"),
        "mlp_norm": (*router, "mlp.gate", "mlp.up"),
    }
    head = "embed" if config.tie_embeddings else "unembed"
    return (
        *(
            Fold(source=f"layers.{norm}", readers=tuple(f"layers.{name}" for name in readers))
            for norm, readers in blocks.items()
        ),
        Fold(source="final_norm", readers=(head,)),
    )


def channel_folds(config: TransformerConfig) -> tuple[Fold, ...]:
    """Every fold along which a factor of a channel can move."""
    norms = norm_folds(config)
    return (
        *(norms[:-1] if config.tie_embeddings else norms),
        Fold(source="layers.attention.v", readers=("layers.attention.o",)),
        Fold(source="layers.mlp.up", readers=("layers.mlp.down",)),
    )


def read_gain(weights: Weights, norm: str, config: TransformerConfig) -> jax.Array:
    """What a normalization multiplies by, float32 (D,) or (L, D)."""
    stored = weights[f"{norm}.gain"].astype(jnp.float32)
    return stored + 1.0 if config.norm_plus_one else stored


def store_gain(weights: Weights, norm: str, gain: jax.Array, config: TransformerConfig) -> dict[str, jax.Array]:
    """The parameter of a normalization that multiplies by `gain`, by its name."""
    before = weights[f"{norm}.gain"]
    return {f"{norm}.gain": (gain - 1.0 if config.norm_plus_one else gain).astype(before.dtype)}


def scale_rows(w: jax.Array, scale: jax.Array) -> jax.Array:
    """w (..., D, F) with each position of the contraction times its scale; `scale` (D,), (L, D) or (L, E, D)."""
    return (w.astype(jnp.float32) * _align(scale, w)[..., :, None]).astype(w.dtype)


def scale_columns(w: jax.Array, scale: jax.Array) -> jax.Array:
    """w (..., D, F) with each output times its scale; `scale` (F,), (L, F) or (L, E, F)."""
    return (w.astype(jnp.float32) * _align(scale, w)[..., None, :]).astype(w.dtype)


def _align(scale: jax.Array, w: jax.Array) -> jax.Array:
    """The same for all experts where it has no axis for them."""
    *stack, size = scale.shape
    return scale.reshape(*stack, *(1,) * (w.ndim - 1 - scale.ndim), size)


def repeat_heads(scale: jax.Array, config: TransformerConfig) -> jax.Array:
    """(..., K * H) of what `v` gives -> (..., N * H) of what `o` reads: query heads that share a kv head stand side by
    side."""
    heads = scale.reshape(*scale.shape[:-1], config.kv_heads, 1, config.head_dim)
    shared = (*scale.shape[:-1], config.kv_heads, config.heads // config.kv_heads, config.head_dim)
    return jnp.broadcast_to(heads, shared).reshape(*scale.shape[:-1], -1)
