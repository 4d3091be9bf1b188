"""Native CPU backend of sparse_matmul: N:4, N:8 and V:N:M (kernels/csrc).

Dimensions: D contraction, F output, C kept elements a column, R rows: the product of x's leading dimensions.
"""

import functools
import math

import jax
import jax.numpy as jnp

from hsai_kernels import native
from hsai_kernels.dispatch import check_platform
from hsai_kernels.gradients import differentiate_as
from hsai_kernels.ops.sparse_matmul.reference import sparse_matmul_reference
from hsai_kernels.stacks import Operand, cut_first
from hsai_kernels.together import empty_like, of_each, split_weights

ARRAYS = 4
"""Of a weight: values, indices, scale and choices, the last two of which may be None."""

BLOCK_COLUMNS = 16
"""V of a V:N:M weight is a multiple of this, the columns of the widest vector."""


def sparse_matmul_cpu(
    x: jax.Array,
    *weights: Operand,
    layer: jax.Array | None = None,
    n: int,
    m: int,
    activation_bits: int | None,
) -> tuple[jax.Array, ...]:
    """For each weight (..., F) = x (..., D) @ weight; values, indices, scale and choices of every weight as in api.py.

    Weights are never rounded and sums are float32, also for bfloat16 activations. With integers activations are
    integers too, as quantized_matmul's are.
    Raises NotImplementedError (or its BackendMissing) for what it does not support.
    """
    check_platform("cpu")
    for values, _, scale, choices in split_weights(weights, ARRAYS):
        native.check_rows(math.prod(x.shape[:-1]), integer=scale is not None)
        if values.shape[-2] == 0 or values.shape[-1] == 0:
            raise NotImplementedError("multiplies weights that are not empty")
        if choices is None and m == 8 and scale is None:
            raise NotImplementedError("multiplies n:8 weights of integers only")
        if scale is not None and x.shape[-1] // scale.shape[-2] * n // m % 8:
            raise NotImplementedError("has groups of integers of whole words (multiples of 8 kept elements)")
        if choices is not None and scale is None:
            raise NotImplementedError("multiplies V:N:M weights of integers only")
        if choices is not None and values.shape[-1] // choices.shape[-1] % BLOCK_COLUMNS:
            raise NotImplementedError(f"multiplies V:N:M weights whose V is a multiple of {BLOCK_COLUMNS}")
        if activation_bits is not None and scale is None:
            raise NotImplementedError("rounds activations for integers only")
    native.load_library()
    kernel = functools.partial(_multiply, n, m, activation_bits)
    reference = of_each(functools.partial(sparse_matmul_reference, n=n, m=m), ARRAYS)
    return differentiate_as(cut_first(reference), kernel)(layer, x, *weights)


def _multiply(
    n: int, m: int, activation_bits: int | None, layer: jax.Array | None, x: jax.Array, *weights: Operand
) -> tuple[jax.Array, ...]:
    target = native.SPARSE_MATMUL if layer is None else native.SPARSE_MATMUL_OF_LAYER
    arrays: list[jax.Array] = []
    for values, indices, scale, choices in split_weights(weights, ARRAYS):
        # The target has a fixed number of arrays a weight: what is not there has no rows.
        scale = empty_like(values, jnp.float32) if scale is None else scale
        choices = empty_like(values, jnp.uint32) if choices is None else choices
        arrays += [values, indices, scale, choices]
    options = {"n": n, "m": m, "activation_bits": activation_bits or 0}
    return native.call_product(target, layer, x, arrays, ARRAYS, options)
