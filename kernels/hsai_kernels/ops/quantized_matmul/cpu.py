"""Native CPU backend of quantized_matmul: up to 8 rows, reading the packed weight once (kernels/csrc).

Dimensions: D contraction, F output, R rows: the product of x's leading dimensions.
"""

import math

import jax
import jax.numpy as jnp

from hsai_kernels import native
from hsai_kernels.dispatch import check_platform
from hsai_kernels.ops.quantized_matmul.reference import quantized_matmul_reference


def quantized_matmul_cpu(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """(..., F) = x (..., D) @ weight; arguments as in api.py, already validated.

    Weights are never rounded and sums are float32, also for bfloat16 activations.
    Int4 activations must be ordinary numbers, 1e-30 to 1e35 in magnitude or 0: the kernel divides them by up to 2^24
    and sums eight at a time, so that smaller ones lose digits, and larger ones and infinities can turn into others.
    Raises NotImplementedError (or its BackendMissing) for what it does not support.
    """
    check_platform("cpu")
    native.check_rows(math.prod(x.shape[:-1]))
    if values.shape[0] == 0 or values.shape[1] == 0:
        raise NotImplementedError("multiplies weights that are not empty")
    group = x.shape[-1] // scale.shape[0]
    if values.dtype == jnp.uint32 and group % 8:
        raise NotImplementedError("has int4 groups of whole words (multiples of 8)")
    native.load_library()
    return _multiply(x, values, scale)


@jax.custom_vjp
def _multiply(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    *lead, contraction = x.shape
    columns = values.shape[1]
    rows = x.reshape(-1, contraction)
    call = jax.ffi.ffi_call(
        native.QUANTIZED_MATMUL,
        jax.ShapeDtypeStruct((rows.shape[0], columns), x.dtype),
        vmap_method="sequential",
    )
    return call(rows, values, scale).reshape(*lead, columns)


def _multiply_forward(
    x: jax.Array, values: jax.Array, scale: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _multiply(x, values, scale), (x, values, scale)


def _multiply_backward(residual: tuple[jax.Array, jax.Array, jax.Array], cotangent: jax.Array) -> tuple:
    return jax.vjp(quantized_matmul_reference, *residual)[1](cotangent)


_multiply.defvjp(_multiply_forward, _multiply_backward)
