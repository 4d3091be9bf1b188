"""Products of the same activations with several weights: one call where a platform has one, else one after the other.

An operand of such a call is x, then the arrays of one weight after those of another, a fixed number each.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hsai_kernels.dispatch import Backend
from hsai_kernels.stacks import Operand

Products = Callable[..., tuple[jax.Array, ...]]
"""A backend of several weights."""


def split_weights(arrays: tuple[Operand, ...], count: int) -> Iterator[tuple[Any, ...]]:
    """The arrays of each weight, `count` at a time."""
    return (arrays[i : i + count] for i in range(0, len(arrays), count))


def of_each(backend: Backend, count: int) -> Products:
    """A backend of single weights of `count` arrays as one of several, which it multiplies by one after the other."""

    def run(x: jax.Array, *arrays: Operand, **options: Any) -> tuple[jax.Array, ...]:
        return tuple(backend(x, *weight, **options) for weight in split_weights(arrays, count))

    return run


def empty_like(values: jax.Array, dtype: DTypeLike) -> jax.Array:
    """(..., 0, F) for values (..., C, F): an array that a weight does not have."""
    *stack, _, columns = values.shape
    return jnp.zeros((*stack, 0, columns), dtype)


def check_alike(kernel: str, weights: Sequence[tuple[Operand, ...]]) -> None:
    """Raises ValueError unless there are weights, and their arrays differ in the last size at most."""

    def describe(array: Operand) -> Any:
        return None if array is None else (str(array.dtype), array.shape[:-1])

    if not weights:
        raise ValueError(f"{kernel} needs a weight or more, got none")
    first, *others = ([describe(array) for array in weight] for weight in weights)
    for other in others:
        if other != first:
            raise ValueError(f"{kernel} takes weights together that differ in columns only, not {first} and {other}")
