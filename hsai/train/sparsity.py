"""Training with N:M sparsity from the first step: SR-STE (2102.04010, eqs. 9 and 10).

The forward pass sees each matrix with only the n largest of every m weights along the contraction. The gradient flows
to all of them as if nothing had been masked (straight-through), and the masked ones are pulled towards zero, so that
the choice settles. What comes out is dense in memory and packs to `NM` without loss.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from hsai.errors import InputError
from hsai.formats import nm_mask
from hsai.formats.nm import check_pattern, index_block
from hsai.formats.packed import check_divides
from hsai.formats.storage import named_weights, replace_weights
from hsai.models.layers import is_matrix

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """N:M sparsity of the matrices in the blocks; embeddings stay dense."""

    n: int = 2
    """Weights that are kept in each group."""

    m: int = 4
    """Size of a group along the contraction."""

    decay: float = 2e-4
    """Pull of masked weights towards zero: lambda of SR-STE, in units of the gradient."""

    def __post_init__(self) -> None:
        check_pattern(self.n, self.m)
        if self.decay < 0:
            raise InputError(f"sparsity.decay={self.decay} must not be negative")


@jax.custom_vjp
def _mask_straight_through(w: jax.Array, mask: jax.Array, decay: float) -> jax.Array:
    return jnp.where(mask, w, 0.0)


def _forward(w: jax.Array, mask: jax.Array, decay: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array, float]]:
    return jnp.where(mask, w, 0.0), (w, mask, decay)


def _backward(saved: tuple[jax.Array, jax.Array, float], grad: jax.Array) -> tuple[jax.Array, None, None]:
    w, mask, decay = saved
    return grad + decay * jnp.where(mask, 0.0, w), None, None


_mask_straight_through.defvjp(_forward, _backward)


def sparsify(model: T, config: SparsityConfig, *, gradient_scale: jax.Array | float = 1.0) -> T:
    """The model as its sparse self, differentiable to the dense weights behind it.

    Args:
      model: with dense matrices (L, D, F), or (L, E, D, F) of experts, under `layers`.
      config: the pattern.
      gradient_scale: what the gradients of this pass will be divided by (the number of targets, where the loss is a
        sum); the pull on masked weights is multiplied by it, so that it is the same for every batch.
    Raises:
      InputError: a matrix that would not pack to `NM` at the end.
    """
    values = {}
    for name, param in named_weights(model).items():
        w = param.get_value()
        if name.startswith("layers.") and is_matrix(param):
            rule = f"{config.n}:{config.m} sparsity of {name}"
            check_divides(rule, index_block(config.n, config.m), w.shape[-2], w.shape)
            mask = jax.lax.stop_gradient(nm_mask(w, config.n, config.m))
            values[name] = _mask_straight_through(w, mask, config.decay * gradient_scale)
    return replace_weights(model, values)
