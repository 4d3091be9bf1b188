"""Rotations that cost nothing when the model runs: QuaRot (2404.00456), as far as it can be folded into the weights.

Of the channels that a product reads a few are far larger than the others, and so are the weights that read and write
them; a scale that serves a whole group then serves none of its weights. In other axes there are no such channels: every
one is a mixture of all. Two turns can be folded:

  - of the residual stream. Every normalization divides by the length of a vector, which no turn changes, once its gain
    has moved into the products that read it (section 4, stage 1a). The embedding and what blocks add are turned, what
    blocks read is turned back.
  - of the values of each head, between `v` and `o`: attention is a sum of them (stage 1b, within a head).

Turns of queries and keys behind their rotary embedding, and of what `down` reads, would have to be computed while the
model runs, and are left out.

D embed, V vocabulary, N heads, K kv heads, H head dim.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from hsai.compress.folds import WRITERS, Weights, norm_folds, read_gain, scale_rows, store_gain
from hsai.compress.plain import map_layers
from hsai.errors import InputError
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import abstract_transformer

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotationConfig:
    """Which turns are folded into the weights, before any of them is compressed."""

    kind: Literal["rotation"] = "rotation"
    """Names this transform in files."""

    residual: bool = True
    """Turns the residual stream."""

    heads: bool = True
    """Turns the values of each head."""

    untie: bool = False
    """Gives the head a table of its own where it is the embedding's: the gain of the last normalization has to move
    into the one and not into the other. Without this, such a model can be turned only if that gain is the same for all
    channels."""

    seed: int = 0
    """Draws the signs."""

    def __post_init__(self) -> None:
        if not self.residual and not self.heads:
            raise InputError("rotation residual=False and heads=False turns nothing")
        if self.untie and not self.residual:
            raise InputError("rotation untie=True is for the turn of the residual stream, and residual=False leaves it")

    def plan(self, config: TransformerConfig) -> TransformerConfig:
        """The config of the turned model; `InputError` for a model whose residual stream cannot be turned."""
        if self.residual and config.post_norm:
            raise InputError(
                "the residual stream cannot be turned: this model normalizes what a block adds to it (post_norm), and "
                "those gains cannot be moved; rotation residual=False turns the values of its heads alone"
            )
        return dataclasses.replace(config, tie_embeddings=config.tie_embeddings and not self.untie)


def make_turn(size: int, rng: np.random.Generator) -> np.ndarray:
    """An orthogonal matrix (size, size) float32 that spreads each channel over all: Hadamard's, with random signs.

    With size = 2^k m and m odd it is a Hadamard matrix of 2^k times (Kronecker) a Hartley matrix of m, whose entries
    cos + sin are at most sqrt(2) times those of a Hadamard matrix, if there were one.
    """
    power = size & -size
    odd = size // power
    angles = 2 * np.pi / odd * (np.outer(np.arange(odd), np.arange(odd)) % odd)
    flat = (np.cos(angles) + np.sin(angles)) / odd**0.5
    for _ in range(power.bit_length() - 1):
        flat = np.kron(np.array([[1, 1], [1, -1]]) / 2**0.5, flat)
    signs = rng.choice([-1.0, 1.0], size)
    return (signs[:, None] * flat).astype(np.float32)


def rotate_model(model: Transformer, config: RotationConfig) -> Transformer:
    """The same function with other weights; with an `unembed` more where the config unties it. Weights are dense.

    Raises:
      InputError: see `RotationConfig.plan`; or the head is the embedding table, stays so, and the last gain is not the
        same for all channels.
    """
    planned = config.plan(model.config)
    weights: dict[str, jax.Array] = {name: param.get_value() for name, param in named_weights(model).items()}
    if planned != model.config:
        weights["unembed"] = weights["embed"]
    residual, head = (np.random.default_rng((config.seed, part)) for part in range(2))
    if config.residual:
        weights |= _turn_residual(weights, jnp.asarray(make_turn(planned.embed, residual)), planned)
    if config.heads:
        weights |= _turn_heads(weights, jnp.asarray(make_turn(planned.head_dim, head)), planned)
    return replace_weights(abstract_transformer(planned), weights)


def _turn_residual(weights: Weights, turn: jax.Array, config: TransformerConfig) -> dict[str, jax.Array]:
    """What changes if the residual stream x becomes x @ turn."""
    changed: dict[str, jax.Array] = {}
    for fold in norm_folds(config):
        gain = read_gain(weights, fold.source, config)
        if fold.readers == ("embed",):
            least, most = float(jnp.min(gain)), float(jnp.max(gain))
            if least != most:
                raise InputError(
                    f"{fold.source} has gains from {least:.3g} to {most:.3g}, which must "
                    "move into the head for the residual stream to be turned, and the head is the embedding table: "
                    f"rotation untie=True gives it a table of its own ({config.embed * config.vocab:,} weights more), "
                    "residual=False turns heads alone"
                )
            continue  # one number for all channels is no obstacle to a turn
        changed |= {name: _turn_rows(scale_rows(weights[name], gain), turn) for name in fold.readers}
        changed |= store_gain(weights, fold.source, jnp.ones_like(gain), config)
    changed["embed"] = _turn_rows(weights["embed"], turn)
    for name in (f"layers.{writer}" for writer in WRITERS):
        changed[name] = _turn_columns(weights[name], turn)
    return changed


def _turn_heads(weights: Weights, turn: jax.Array, config: TransformerConfig) -> dict[str, jax.Array]:
    """What changes if the value x (H,) of every head becomes x @ turn."""

    def turn_outputs(w: jax.Array) -> jax.Array:
        heads = w.reshape(*w.shape[:-1], config.kv_heads, config.head_dim)
        return _turn_columns(heads, turn).reshape(w.shape)

    inner, outer = weights["layers.attention.v"], weights["layers.attention.o"]
    heads = outer.reshape(outer.shape[0], config.heads, config.head_dim, config.embed)
    changed = {
        "layers.attention.v": turn_outputs(inner),
        "layers.attention.o": _turn_rows(heads, turn).reshape(outer.shape),
    }
    if config.qkv_bias:
        changed["layers.attention.v_bias"] = turn_outputs(weights["layers.attention.v_bias"])
    return changed


@jax.jit
def _turn_rows(w: jax.Array, turn: jax.Array) -> jax.Array:
    """turn^T @ w for (..., D, F), in w's dtype: of a weight whose input is turned."""
    turned: jax.Array = map_layers(
        lambda layer: jnp.matmul(turn.T, layer.astype(jnp.float32), precision=HIGHEST).astype(w.dtype), w
    )
    return turned


@jax.jit
def _turn_columns(w: jax.Array, turn: jax.Array) -> jax.Array:
    """w @ turn for (..., D, F), in w's dtype: of a weight whose output is turned."""
    turned: jax.Array = map_layers(
        lambda layer: jnp.matmul(layer.astype(jnp.float32), turn, precision=HIGHEST).astype(w.dtype), w
    )
    return turned
