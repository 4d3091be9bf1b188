"""The gated feed-forward block: SwiGLU or GeGLU (2002.05202, eq. 6).

B batch, T query, D embed, F ffn.
"""

from typing import TYPE_CHECKING, Literal

import jax
from flax import nnx

from hsai.formats import project, project_all
from hsai.models.layers import declare

if TYPE_CHECKING:
    from hsai.models.transformer import TransformerConfig

Activation = Literal["silu", "gelu"]


def activate(x: jax.Array, activation: Activation) -> jax.Array:
    """The gate's nonlinearity. GELU has its tanh form, which released GeGLU checkpoints were trained with."""
    return jax.nn.silu(x) if activation == "silu" else jax.nn.gelu(x, approximate=True)


class Mlp(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: "TransformerConfig", *, rngs: nnx.Rngs) -> None:
        d, f = config.embed, config.mlp
        self.gate = declare(rngs, (d, f), ("embed", "mlp"), std=d**-0.5)
        self.up = declare(rngs, (d, f), ("embed", "mlp"), std=d**-0.5)
        self.down = declare(rngs, (f, d), ("mlp", "embed"), std=(f * 2 * config.layers) ** -0.5)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, D) -> (B, T, D)."""
        weights = self.gate.get_value(), self.up.get_value()
        gate, up = project_all(x, weights, out_axes=[("batch", "seq", "mlp")] * 2, in_axis="embed")
        hidden = activate(gate, self.activation) * up
        return project(hidden, self.down.get_value(), out_axes=("batch", "seq", "embed"), in_axis="mlp")
