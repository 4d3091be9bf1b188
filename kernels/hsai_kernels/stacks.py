"""Weights of many layers, stacked, of which a product takes one.

A layer that is cut out of a stack first is a copy: read, written, and read again for each token that is decoded. A
backend that finds the layer by itself reads it once, where it lies.

L layers.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import Backend, Result

Operand = jax.Array | None
Given = TypeVar("Given", bound=Operand)
Tree = TypeVar("Tree")


def cut_layer(tree: Tree, layer: jax.Array | None) -> Tree:
    """Of a tree of arrays (L, ...) those of a layer; the tree itself where there is no layer."""
    if layer is None:
        return tree
    cut: Tree = jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, layer, keepdims=False), tree)
    return cut


def of_cut_layer(backend: Backend) -> Backend:
    """A backend of single weights, `(x, *weight, **options)`, as one that also takes a layer of stacked ones."""

    def run(x: jax.Array, *weight: Operand, layer: jax.Array | None, **options: object) -> jax.Array:
        return backend(x, *cut_layer(weight, layer), **options)

    return run


def cut_first(backend: Callable[..., Result]) -> Callable[..., Result]:
    """The same as a function of operands alone, the layer in front of them."""
    return lambda layer, x, *weight: backend(x, *cut_layer(weight, layer))


def check_layer(kernel: str, layer: jax.Array | None, operands: tuple[Operand, ...]) -> None:
    """Raises ValueError unless there is no layer, or it is a number and all arrays that are there have as many."""
    if layer is None:
        return
    if layer.shape != () or not jnp.issubdtype(layer.dtype, jnp.integer):
        raise ValueError(f"{kernel} has layer as one integer, not {layer.dtype}{layer.shape}")
    there = [operand for operand in operands if operand is not None]
    if any(operand.ndim == 0 for operand in there) or len({operand.shape[0] for operand in there}) != 1:
        shapes = ", ".join(str(operand.shape) for operand in there)
        raise ValueError(f"{kernel} with a layer needs arrays of as many layers each, got {shapes}")


def describe_layer(operand: Given, layer: jax.Array | None) -> Given:
    """Of a stack (L, ...), a layer's shape and dtype; without a layer, or an operand, what is given."""
    if layer is None or operand is None:
        return operand
    shape: Given = jax.ShapeDtypeStruct(operand.shape[1:], operand.dtype)  # type: ignore[assignment]
    return shape
