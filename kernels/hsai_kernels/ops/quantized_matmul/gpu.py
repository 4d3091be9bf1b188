"""GPU backend of quantized_matmul: Pallas Triton, any number of rows, weights decoded in registers (gpu_product.py).

The win is bytes: a bfloat16 weight of D * F elements takes 2 D F bytes, int8 takes half of that, and int4 with a
float32 scale for 32 positions 5/8 of a byte an element, 0.31 of bfloat16. The products themselves are the dense ones.

Dimensions: D contraction, F output, g contraction positions that share a scale.
"""

import functools

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import check_platform
from hsai_kernels.gpu_product import ProductTile, multiply_compressed
from hsai_kernels.gradients import differentiate_as
from hsai_kernels.ops.quantized_matmul.gpu_rounded import multiply_on_gpu
from hsai_kernels.ops.quantized_matmul.reference import INT4_ZERO, add_minimum, quantized_matmul_reference
from hsai_kernels.ops.quantized_matmul.rounded import find_levels, multiply_rounded, name_kernel
from hsai_kernels.packing import find_shift
from hsai_kernels.triton_blocks import load_matrix

ELEMENTS = 8
"""How many int4 a word has."""


def quantized_matmul_gpu(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    minimum: jax.Array | None = None,
    *,
    bits: int = 4,
    centered: bool = False,
    activation_bits: int | None = None,
    tile: ProductTile | None = None,
) -> jax.Array:
    """(..., F) = x (..., D) @ weight; arguments as in api.py, already validated.

    Sums are float32, and float32 activations are multiplied exactly. With bfloat16 activations a weight's scale is
    applied after the product where a block lies in one group, and otherwise the weight is rounded to bfloat16. What
    minima add is a product of its own, by XLA. Rounded activations are multiplied as integers, by codes of all kinds
    (gpu_rounded.py); the gradients are those without rounding.
    `tile` is for tests. Raises NotImplementedError for what it does not support.
    """
    check_platform("gpu")
    if activation_bits is None and values.dtype == jnp.uint32 and (bits != 4 or centered):
        raise NotImplementedError(
            f"has, where activations are not rounded, words of codes of -8 to 7 only, not {bits} bits, {centered=}"
        )
    if x.size == 0 or values.size == 0:
        raise NotImplementedError(f"multiplies what is not empty, not x {x.shape} and values {values.shape}")
    reference = functools.partial(quantized_matmul_reference, bits=bits, centered=centered)
    if activation_bits is not None:
        return differentiate_as(reference, functools.partial(_multiply_rounded, bits, centered, tile))(
            x, values, scale, minimum
        )
    group = x.shape[-1] // scale.shape[0]
    if values.dtype == jnp.uint32 and group % ELEMENTS:
        raise NotImplementedError(f"has int4 groups of whole words (multiples of {ELEMENTS}), not of {group}")
    # The gradient rebuilds the dense weight: XLA's product then serves x and the scales.
    return differentiate_as(reference, functools.partial(_multiply, tile))(x, values, scale, minimum)


def _multiply(
    tile: ProductTile | None, x: jax.Array, values: jax.Array, scale: jax.Array, minimum: jax.Array | None
) -> jax.Array:
    if minimum is not None:
        return add_minimum(functools.partial(_multiply, tile), x, values, scale, minimum)
    columns = values.shape[1]
    read, positions = (_read_int8, 1) if values.dtype == jnp.int8 else (_read_int4, ELEMENTS)
    rows = x.reshape(-1, x.shape[-1])
    kernel = f"quantized_matmul int{8 if positions == 1 else 4}"
    out = multiply_compressed(kernel, read, positions, rows, (values,), scale, columns, tile)
    return out.reshape(*x.shape[:-1], columns)


def _multiply_rounded(
    bits: int,
    centered: bool,
    tile: ProductTile | None,
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    minimum: jax.Array | None,
) -> jax.Array:
    levels = find_levels(values, bits, centered, minimum)
    multiply = functools.partial(multiply_on_gpu, name_kernel(values, bits), levels, tile)
    return multiply_rounded(multiply, x, values, scale, minimum)


def _read_int8(
    refs: tuple[jax.Array, ...], unit: jax.Array, column: jax.Array, real: jax.Array | None
) -> tuple[jax.Array, ...]:
    """A unit is a row of values."""
    return (load_matrix(refs[0], unit, column, real),)


def _read_int4(
    refs: tuple[jax.Array, ...], unit: jax.Array, column: jax.Array, real: jax.Array | None
) -> tuple[jax.Array, ...]:
    """A unit is a row of words."""
    words = load_matrix(refs[0], unit, column, real)
    return tuple(
        ((words >> jnp.uint32(find_shift(element, 4))) & jnp.uint32(15)).astype(jnp.int32) - INT4_ZERO
        for element in range(ELEMENTS)
    )
