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
    """Whether a parameter is multiplied by (or looked up in), and no gain or bias: two axes besides stacked ones."""
    return len([axis for axis in param.get_metadata("out_sharding") if axis not in ("layers", "experts")]) == 2


class RMSNorm(nnx.Module):
    """Root-mean-square normalization with a learned gain (1910.07467, eq. 4), computed in float32.

    With `plus_one` the gain is 1 + what is stored (Gemma), so that weight decay and rounding pull towards one.
    """

    def __init__(self, size: int, eps: float, *, axis: str, plus_one: bool = False) -> None:
        self.gain = nnx.Param(jnp.full((size,), 0.0 if plus_one else 1.0, jnp.float32), out_sharding=(axis,))
        self.eps = eps
        self.plus_one = plus_one

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., size) -> (..., size), in x's dtype."""
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        gain = self.gain[...].astype(jnp.float32) + 1.0 if self.plus_one else self.gain[...]
        return (wide * inverse * gain).astype(x.dtype)
