"""Reverse-mode gradients for kernels that have none of their own: those of the reference, which defines them."""

from collections.abc import Callable
from typing import Any

import jax

Product = Callable[..., Any]
"""An array, or several."""


def differentiate_as(reference: Product, kernel: Product) -> Product:
    """`kernel`, with the gradients of `reference`: both are functions of the same operands, arrays or None.

    The gradient computes the reference anew from the operands, which rebuilds a packed weight. Integers have none.
    """
    call = jax.custom_vjp(kernel)

    def forward(*operands: jax.Array | None) -> tuple[Any, tuple[jax.Array | None, ...]]:
        return call(*operands), operands

    def backward(operands: tuple[jax.Array | None, ...], grad: Any) -> tuple:
        return jax.vjp(reference, *operands)[1](grad)

    call.defvjp(forward, backward)
    return call


def differentiate_through(reference: Product, kernel: Product) -> Product:
    """`kernel` where no gradient is taken, and `reference` where one is, forward and backward.

    For a reference that keeps what its backward pass needs; both are functions of the same operands, arrays or None.
    """
    call = jax.custom_vjp(kernel)

    def forward(*operands: jax.Array | None) -> tuple[jax.Array, Callable[..., tuple]]:
        return jax.vjp(reference, *operands)

    def backward(pull_back: Callable[..., tuple], grad: jax.Array) -> tuple:
        return pull_back(grad)

    call.defvjp(forward, backward)
    return call
