"""Weights that look on; calibration puts them in the place of the real ones.

The model is written once, without hooks, and `project` is the one place that all products pass. `Observed` takes note
there of what it is multiplied by, for H = X^T X of the solvers. It lives within one trace: it is made inside of the
function that is compiled, and that function returns what was noted. `Tapped` has the gradient of what it gives squared
and summed, for the sensitivities of an allocation; jax's own differentiation carries that out of any scan.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hsai.formats.packed import Packed, Weight, to_dense


class Notes:
    """Gram matrices of the inputs of observed weights; weights with the same input share one."""

    def __init__(self) -> None:
        self._inputs: list[jax.Array] = []
        self._grams: list[jax.Array] = []
        self._owner: dict[str, int] = {}

    def add(self, name: str, x: jax.Array) -> None:
        """Adds x^T x of (..., D), float32 (D, D), for the weight `name`."""
        index = next((i for i, seen in enumerate(self._inputs) if seen is x), len(self._inputs))
        if index == len(self._inputs):
            self._inputs.append(x)
            self._grams.append(sum_squares(x))
        if name in self._owner:
            raise ValueError(f"{name} was multiplied by twice in one pass; its inputs would be mixed up")
        self._owner[name] = index

    @property
    def grams(self) -> list[jax.Array]:
        """Each input's matrix, in the order in which inputs were met."""
        return self._grams

    @property
    def owner(self) -> Mapping[str, int]:
        """Which of `grams` belongs to a weight."""
        return self._owner


def sum_squares(x: jax.Array) -> jax.Array:
    """X^T X of (..., D), float32 (D, D)."""
    wide = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return jnp.matmul(wide.T, wide, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observed(Packed):
    """`value`, and where to note what it meets."""

    value: Weight
    name: str = dataclasses.field(metadata={"static": True})
    notes: Notes = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def dense(self) -> jax.Array:
        return to_dense(self.value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tapped(Packed):
    """`value`, and `sink`, float32 (..., F): zeros, with sum g^2 for a gradient, g that of each row of the product."""

    value: Weight
    sink: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def dense(self) -> jax.Array:
        return to_dense(self.value)

    def tap(self, y: jax.Array) -> jax.Array:
        """y (..., F) itself."""
        return _tap(y, self.sink)


@jax.custom_vjp
def _tap(y: jax.Array, sink: jax.Array) -> jax.Array:
    return y


def _tap_forward(y: jax.Array, sink: jax.Array) -> tuple[jax.Array, None]:
    return y, None


def _tap_backward(_: None, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    # No gradient of anything, but a sum over rows that adds up over batches as one does.
    return grad, jnp.sum(jnp.square(grad.astype(jnp.float32)), axis=tuple(range(grad.ndim - 1)))


_tap.defvjp(_tap_forward, _tap_backward)
