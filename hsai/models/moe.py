"""Mixture of experts: a router gives each token to a few of many gated feed-forward blocks (1701.06538, 2401.04088).

Dropless: every token is computed by all the experts that it chose, however many others chose them too; no expert has a
capacity. Tokens are sorted by their expert, multiplied by one ragged product, and put back (2211.15841). Where there
are fewer choices than experts, as in decoding, only the chosen experts' weights are read instead.

B batch, T query, D embed, F ffn of an expert, E experts, A active experts of a token, N = B * T tokens.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from hsai.errors import InputError
from hsai.formats import Weight, project, project_sorted, to_dense
from hsai.formats.observed import is_watched, takes_notes
from hsai.models.layers import declare
from hsai.models.mlp import activate
from hsai.sharding import Axes, constrain
from hsai.shards import add_parts, find_splits, map_shards

if TYPE_CHECKING:
    from hsai.models.transformer import TransformerConfig

TOKENS: Axes = ("batch", "seq", None)
NARROW: Axes = ("experts", None, "mlp")
WIDE: Axes = ("experts", "mlp", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Experts in the place of the feed-forward block; `model.mlp` is the width of each."""

    experts: int
    """Experts of a layer."""

    active: int
    """Experts that a token goes to: those with the highest probabilities."""

    normalize: bool = True
    """The weights of a token's experts are scaled to add up to one (Mixtral, and Qwen 3 as released)."""

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise InputError(f"moe.experts={self.experts} must be at least 1")
        if not 1 <= self.active <= self.experts:
            raise InputError(f"moe.active={self.active} must be between 1 and moe.experts={self.experts}")


class MoE(nnx.Module):
    """The sum over a token's experts of weight * down(activation(gate(x)) * up(x))."""

    def __init__(self, config: "TransformerConfig", moe: MoEConfig, *, rngs: nnx.Rngs) -> None:
        d, f, e = config.embed, config.mlp, moe.experts
        self.router = declare(rngs, (d, e), ("embed", None), std=d**-0.5)
        self.gate = declare(rngs, (e, d, f), ("experts", "embed", "mlp"), std=d**-0.5)
        self.up = declare(rngs, (e, d, f), ("experts", "embed", "mlp"), std=d**-0.5)
        self.down = declare(rngs, (e, f, d), ("experts", "mlp", "embed"), std=(f * 2 * config.layers) ** -0.5)
        self.activation = config.activation
        self.moe = moe

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, D) -> (B, T, D).

        On a mesh each device computes what its experts (or, where they do not divide, its part of each one's width) add
        to its tokens; the sums are made in float32.
        """
        chosen, weights = self.route(x)
        gate, up, down = self.gate.get_value(), self.up.get_value(), self.down.get_value()
        splits = find_splits((TOKENS, x), (NARROW, gate), (NARROW, up), (WIDE, down))
        noted = takes_notes(gate, up, down)
        if noted:  # in one trace for all devices, and not in that of a device's part
            splits = {axis: () for axis in splits}
        parts = (*splits["experts"], *splits["mlp"])
        dtype = x.dtype

        def compute(
            x: jax.Array, chosen: jax.Array, weights: jax.Array, gate: Weight, up: Weight, down: Weight
        ) -> jax.Array:
            tokens, width = x.shape[0] * x.shape[1], chosen.shape[-1]
            first = jnp.zeros((), jnp.int32)
            for name in splits["experts"]:
                first = first * jax.lax.axis_size(name) + jax.lax.axis_index(name)
            mine = chosen.reshape(tokens, width) - first * gate.shape[0]
            flat = x.astype(dtype).reshape(tokens, -1)
            few = tokens * width <= gate.shape[0] and not is_watched(gate, up, down)
            apply = self._gather if few else self._sort
            y = apply(flat, mine, weights.reshape(tokens, width), gate, up, down)
            return add_parts(y, parts).astype(dtype).reshape(x.shape)

        axes = (TOKENS, TOKENS, TOKENS, NARROW, NARROW, WIDE)
        # By way of float32, so that over devices which share tokens the gradient of x is added up in it.
        mapped = compute if noted else map_shards(compute, splits, axes, TOKENS)
        y: jax.Array = mapped(x.astype(jnp.float32), chosen, weights, gate, up, down)
        return constrain(y, "batch", "seq", "embed")

    def imbalance(self, x: jax.Array, counted: jax.Array) -> jax.Array:
        """How unevenly experts are used: E times the sum over experts of share of the choices * mean probability.

        It is 1 where all are used alike, and E where all tokens surely go to one of them. Its gradient makes experts
        less likely that are chosen more often than others (Switch, 2101.03961, eq. 4; there A is 1).

        Args:
          x: (B, T, D).
          counted: float32 (B, T), the weight of each token; 0 leaves it out.
        Returns: float32 (); 0 where no token counts.
        """
        chances = self._rate(x)
        _, chosen = jax.lax.top_k(chances, self.moe.active)
        weights = counted[..., None] / jnp.maximum(jnp.sum(counted), jnp.finfo(jnp.float32).tiny)
        picks = jnp.sum(jax.nn.one_hot(chosen, self.moe.experts, dtype=jnp.float32), axis=-2) / self.moe.active
        shares, means = (jnp.sum(weights * part, axis=(0, 1)) for part in (picks, chances))
        return self.moe.experts * jnp.sum(shares * means)

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The experts of each token, int32 (B, T, A), and their weights, float32 (B, T, A)."""
        weights, chosen = jax.lax.top_k(self._rate(x), self.moe.active)
        if self.moe.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return chosen, weights

    def _rate(self, x: jax.Array) -> jax.Array:
        """The probability of each expert, float32 (B, T, E)."""
        router = self.router.get_value()
        logits = project(x, router, out_axes=TOKENS, in_axis="embed", out_dtype=jnp.float32)
        return jax.nn.softmax(logits, axis=-1)

    def _sort(
        self, x: jax.Array, chosen: jax.Array, weights: jax.Array, gate: Weight, up: Weight, down: Weight
    ) -> jax.Array:
        """What the experts at hand add to each token, (N, D) float32.

        Args:
          x: (N, D).
          chosen: int32 (N, A); those outside of the experts at hand are others' work.
          weights: float32 (N, A).
          gate, up, down: (E, D, F), (E, D, F), (E, F, D), of the experts at hand.
        """
        experts, active = gate.shape[0], chosen.shape[-1]
        # The work of others goes behind that of the last expert, where no group reaches.
        owner = jnp.where((chosen >= 0) & (chosen < experts), chosen, experts).reshape(-1)
        order = jnp.argsort(owner, stable=True)
        sizes = jnp.bincount(owner, length=experts + 1)[:experts].astype(jnp.int32)
        owned = (jnp.arange(order.size) < jnp.sum(sizes))[:, None]
        rows = jnp.where(owned, x[order // active], 0)

        hidden = activate(project_sorted(rows, gate, sizes), self.activation) * project_sorted(rows, up, sizes)
        y = project_sorted(hidden, down, sizes)[jnp.argsort(order)].astype(
            jnp.float32
        )  # in the order of the tokens again
        return jnp.sum((y * weights.reshape(-1, 1)).reshape(*chosen.shape, -1), axis=1)

    def _gather(
        self, x: jax.Array, chosen: jax.Array, weights: jax.Array, gate: Weight, up: Weight, down: Weight
    ) -> jax.Array:
        """As `_sort`, by reading the weights of the chosen experts: for few tokens."""
        experts, active = gate.shape[0], chosen.shape[-1]
        owned = ((chosen >= 0) & (chosen < experts)).reshape(-1)
        owner = jnp.clip(chosen.reshape(-1), 0, experts - 1)

        def multiply(rows: jax.Array, w: Weight) -> jax.Array:
            dense = to_dense(jax.tree.map(lambda leaf: leaf[owner], w)).astype(rows.dtype)
            return jnp.einsum("nd,ndf->nf", rows, dense)

        rows = jnp.repeat(x, active, axis=0)
        hidden = activate(multiply(rows, gate), self.activation) * multiply(rows, up)
        y = multiply(hidden, down).astype(jnp.float32)
        y = jnp.where(owned[:, None], y * weights.reshape(-1, 1), 0.0)
        return jnp.sum(y.reshape(*chosen.shape, -1), axis=1)
