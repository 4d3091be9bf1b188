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
from hsai_kernels.stacks import Operand, cut_first
from hsai_kernels.together import empty_like, of_each, split_weights

ARRAYS = 3
"""Of a weight: values, scale and minimum, the last of which may be None."""


def quantized_matmul_cpu(
    x: jax.Array,
    *weights: Operand,
    layer: jax.Array | None = None,
    bits: int,
    centered: bool,
    activation_bits: int | None,
) -> tuple[jax.Array, ...]:
    """For each weight (..., F) = x (..., D) @ weight; values, scale and minimum of each as in api.py, validated.

    Weights are never rounded and sums are float32, also for bfloat16 activations. Activations are integers that share a
    power of two in blocks of at most 64: 23 bits below the largest of the block for float32, 15 for bfloat16; an
    infinity or a NaN makes the row's results NaN. Of many rows on a machine without products of bytes they stay floats.
    Raises NotImplementedError (or its BackendMissing) for what it does not support.
    """
    check_platform("cpu")
    native.check_rows(math.prod(x.shape[:-1]), integer=True)
    for values, scale, _ in split_weights(weights, ARRAYS):
        if values.shape[-2] == 0 or values.shape[-1] == 0:
            raise NotImplementedError("multiplies weights that are not empty")
        if values.dtype == jnp.uint32 and x.shape[-1] // scale.shape[-2] % count_elements(bits):
            raise NotImplementedError(
                f"has groups of whole words (multiples of {count_elements(bits)} codes of {bits} bits)"
            )
    native.load_library()
    kernel = functools.partial(_multiply, bits, centered, activation_bits)
    reference = of_each(functools.partial(quantized_matmul_reference, bits=bits, centered=centered), ARRAYS)
    return differentiate_as(cut_first(reference), kernel)(layer, x, *weights)


def _multiply(
    bits: int, centered: bool, activation_bits: int | None, layer: jax.Array | None, x: jax.Array, *weights: Operand
) -> tuple[jax.Array, ...]:
    target = native.QUANTIZED_MATMUL if layer is None else native.QUANTIZED_MATMUL_OF_LAYER
    arrays: list[jax.Array] = []
    for values, scale, minimum in split_weights(weights, ARRAYS):
        # The target has a fixed number of arrays a weight: what is not there has no rows.
        arrays += [values, scale, empty_like(values, scale.dtype) if minimum is None else minimum]
    packed = arrays[0].dtype == jnp.uint32
    options = {"bits": bits if packed else 8, "centered": centered, "activation_bits": activation_bits or 0}
    return native.call_product(target, layer, x, arrays, ARRAYS, options)
