"""Reverse-mode gradients for kernels that have none of their own: those of the reference, which defines them."""

from collections.abc import Callable

import jax

Product = Callable[..., jax.Array]


def differentiate_as(reference: Product, kernel: Product) -> Product:
    """`kernel`, with the gradients of `reference`: both are functions of the same operands, arrays or None.

    The gradient computes the reference anew from the operands, which rebuilds a packed weight. Integers have none.
    """
    call = jax.custom_vjp(kernel)

    def forward(*operands: jax.Array | None) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
        return call(*operands), operands

    def backward(operands: tuple[jax.Array | None, ...], grad: jax.Array) -> tuple:
        return jax.vjp(reference, *operands)[1](grad)

    call.defvjp(forward, backward)
    return call
