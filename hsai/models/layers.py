"""The small parts: how a weight is declared, and RMS normalization."""

import jax
import jax.numpy as jnp
from flax import nnx

from hsai.sharding import Axes


def declare(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, *, std: float) -> nnx.Param:
    """A float32 parameter with its logical axes, drawn from a normal distribution cut at two deviations.

    Cutting narrows the spread by 0.8796; the draw is widened by as much, so that `std` is what the weights have.
    """
    value = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32) * (std / 0.87962566)
    return nnx.Param(value, out_sharding=axes)


def is_matrix(param: nnx.Variable) -> bool:
    """Whether a parameter is multiplied by (or looked up in), and no gain: two axes besides that of stacked layers."""
    return len([axis for axis in param.get_metadata("out_sharding") if axis != "layers"]) == 2


class RMSNorm(nnx.Module):
    """Root-mean-square normalization with a learned gain (1910.07467, eq. 4), computed in float32."""

    def __init__(self, size: int, eps: float, *, axis: str) -> None:
        self.gain = nnx.Param(jnp.ones((size,), jnp.float32), out_sharding=(axis,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., size) -> (..., size), in x's dtype."""
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * self.gain[...]).astype(x.dtype)
