"""TPU backend of quantized_matmul (Pallas, Mosaic): any number of rows by int8 values or words of codes.

Decoding reads the weight once for up to 512 rows: 1 or 1/2 byte an element, where bfloat16 has 2. Prefill rebuilds each
block of the weight once for 512 rows. What an element costs the vector unit, counted and not measured: about 3
operations for int8, 6 for int4 (shift, mask, conversion, offset, scale, rounding). On a v5e about 4,096 lanes meet 870
bytes of HBM a cycle. So int8 is bound by its bytes (its work takes the time of 0.6 bytes), and int4 by its operations:
the time of 1.3 bytes, which is faster than bfloat16 and slower than int8; what it saves for certain is memory.

Dimensions: D contraction, F output, J planes, U rows a plane.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import check_platform
from hsai_kernels.gradients import differentiate_as
from hsai_kernels.ops.quantized_matmul.reference import add_minimum, find_zero, quantized_matmul_reference
from hsai_kernels.ops.quantized_matmul.rounded import find_levels, multiply_rounded, name_kernel
from hsai_kernels.ops.quantized_matmul.tpu_product import Packing, load_strided, multiply_packed
from hsai_kernels.ops.quantized_matmul.tpu_rounded import multiply_on_tpu
from hsai_kernels.packing import count_elements, find_halves, find_shift


def quantized_matmul_tpu(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    minimum: jax.Array | None = None,
    *,
    bits: int = 4,
    centered: bool = False,
    activation_bits: int | None = None,
) -> jax.Array:
    """(..., F) = x (..., D) @ weight; arguments as in api.py, already validated.

    Scaled weights are rounded to x's dtype, as the reference does; sums are float32. What minima add is a product of
    its own, by XLA. Rounded activations are multiplied as integers (tpu_rounded.py). The gradients are the reference's
    without rounding, which rebuilds the dense weight. Raises NotImplementedError for what it does not support.
    """
    check_platform("tpu")
    reference = functools.partial(quantized_matmul_reference, bits=bits, centered=centered)
    multiply = _multiply if activation_bits is None else _multiply_rounded
    return differentiate_as(reference, functools.partial(multiply, bits, centered))(x, values, scale, minimum)


def _multiply(
    bits: int, centered: bool, x: jax.Array, values: jax.Array, scale: jax.Array, minimum: jax.Array | None
) -> jax.Array:
    if minimum is not None:
        return add_minimum(functools.partial(_multiply, bits, centered), x, values, scale, minimum)
    kernel = f"quantized_matmul int{8 if values.dtype == jnp.int8 else bits}"
    return multiply_packed(kernel, choose_packing(values, bits, centered), x, (values,), scale)


def _multiply_rounded(
    bits: int, centered: bool, x: jax.Array, values: jax.Array, scale: jax.Array, minimum: jax.Array | None
) -> jax.Array:
    if 0 in (x.size, values.size):
        raise NotImplementedError(f"multiplies arrays that are not empty, not x {x.shape} by {values.shape}")
    levels = find_levels(values, bits, centered, minimum)
    multiply = functools.partial(multiply_on_tpu, name_kernel(values, bits), levels)
    return multiply_rounded(multiply, x, values, scale, minimum)


def _load_int8(planes: int, packed: list[Any]) -> list[jax.Array]:
    """Plane j is the rows j, j + J, ..."""
    return load_strided(packed[0], planes)


def _load_codes(bits: int, zero: float, planes: int, packed: list[Any]) -> list[jax.Array]:
    """Plane j is the codes j, j + J, ... of a column."""
    words = load_strided(packed[0], planes * bits // 32)
    return [take_element(words, bits, j).astype(jnp.float32) - zero for j in range(planes)]


def take_element(words: list[jax.Array], bits: int, element: int) -> jax.Array:
    """int32: an element of every column, where packing.py puts it; `words` are the rows that it is counted from."""
    count = count_elements(bits)
    if bits != 3:
        return _take_bits(words[element // count], bits, find_shift(element % count, bits))
    three = words[element // count * 3 :]
    (low, low_shift), (high, high_shift) = find_halves(element % count)
    return _take_bits(three[low], 2, low_shift) + 4 * _take_bits(three[high], 1, high_shift)


def _take_bits(words: jax.Array, bits: int, shift: int) -> jax.Array:
    """int32: `bits` bits of every uint32 word, from bit `shift` on."""
    words = jax.lax.bitcast_convert_type(words, jnp.int32)
    return jax.lax.shift_right_logical(words, jnp.full_like(words, shift)) & (2**bits - 1)


INT8 = Packing(period=1, load_planes=_load_int8, rows=((1, 1),))
CODES = {
    (bits, centered): Packing(
        period=count_elements(bits),
        load_planes=functools.partial(_load_codes, bits, find_zero(bits, centered)),
        rows=((bits, 32),),
    )
    for bits in (2, 3, 4)
    for centered in (False, True)
}


def choose_packing(values: jax.Array | jax.ShapeDtypeStruct, bits: int, centered: bool) -> Packing:
    """How values of that dtype are packed; `bits` and `centered` count for words only."""
    return INT8 if values.dtype == jnp.int8 else CODES[bits, centered]
