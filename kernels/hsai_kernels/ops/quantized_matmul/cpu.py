"""Native CPU backend of quantized_matmul (kernels/csrc).

Dimensions: D contraction, F output, R rows: the product of x's leading dimensions.
"""

import functools
import math

import jax
import jax.numpy as jnp

from hsai_kernels import native
from hsai_kernels.dispatch import check_platform
from hsai_kernels.gradients import differentiate_as
from hsai_kernels.ops.quantized_matmul.reference import quantized_matmul_reference
from hsai_kernels.packing import count_elements


def quantized_matmul_cpu(
    x: jax.Array, values: jax.Array, scale: jax.Array, *, bits: int, centered: bool, activation_bits: int | None
) -> jax.Array:
    """(..., F) = x (..., D) @ weight; arguments as in api.py, already validated.

    Weights are never rounded and sums are float32, also for bfloat16 activations. Activations are integers that share a
    power of two in blocks of at most 64: 23 bits below the largest of the block for float32, 15 for bfloat16; an
    infinity or a NaN makes the row's results NaN.
    Raises NotImplementedError (or its BackendMissing) for what it does not support.
    """
    check_platform("cpu")
    packed = values.dtype == jnp.uint32
    native.check_rows(math.prod(x.shape[:-1]), integer=True)
    if values.shape[0] == 0 or values.shape[1] == 0:
        raise NotImplementedError("multiplies weights that are not empty")
    if packed and x.shape[-1] // scale.shape[0] % count_elements(bits):
        raise NotImplementedError(
            f"has groups of whole words (multiples of {count_elements(bits)} codes of {bits} bits)"
        )
    native.load_library()
    kernel = functools.partial(_multiply, bits if packed else 8, centered, activation_bits)
    reference = functools.partial(quantized_matmul_reference, bits=bits, centered=centered)
    return differentiate_as(reference, kernel)(x, values, scale)


def _multiply(
    bits: int, centered: bool, activation_bits: int | None, x: jax.Array, values: jax.Array, scale: jax.Array
) -> jax.Array:
    *lead, contraction = x.shape
    columns = values.shape[1]
    rows = x.reshape(-1, contraction)
    call = jax.ffi.ffi_call(
        native.QUANTIZED_MATMUL,
        jax.ShapeDtypeStruct((rows.shape[0], columns), x.dtype),
        vmap_method="sequential",
    )
    result = call(rows, values, scale, bits=bits, centered=centered, activation_bits=activation_bits or 0)
    return result.reshape(*lead, columns)
