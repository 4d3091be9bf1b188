"""Observed: a weight that takes note of what it is multiplied by; calibration puts it in the place of the real one.

Solvers need H = X^T X of each product's input X, and the model is written once, without hooks. `project` is the one
place that all products pass, so it is where a weight may look on. An observed weight lives within one trace: it is made
inside of the function that is compiled, and that function returns what was noted.
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
            wide = x.astype(jnp.float32).reshape(-1, x.shape[-1])
            self._inputs.append(x)
            self._grams.append(jnp.matmul(wide.T, wide, precision=jax.lax.Precision.HIGHEST))
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
