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

BLOCK_COLUMNS = 16
"""V of a V:N:M weight is a multiple of this, the columns of the widest vector."""


def sparse_matmul_cpu(
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    scale: jax.Array | None,
    choices: jax.Array | None,
    *,
    n: int,
    m: int,
    activation_bits: int | None,
) -> jax.Array:
    """(..., F) = x (..., D) @ weight; arguments as in api.py, already validated.

    Weights are never rounded and sums are float32, also for bfloat16 activations. With integers activations are
    integers too, as quantized_matmul's are.
    Raises NotImplementedError (or its BackendMissing) for what it does not support.
    """
    check_platform("cpu")
    native.check_rows(math.prod(x.shape[:-1]), integer=scale is not None)
    if values.shape[0] == 0 or values.shape[1] == 0:
        raise NotImplementedError("multiplies weights that are not empty")
    if choices is None and m == 8 and scale is None:
        raise NotImplementedError("multiplies n:8 weights of integers only")
    if scale is not None and x.shape[-1] // scale.shape[0] * n // m % 8:
        raise NotImplementedError("has groups of integers of whole words (multiples of 8 kept elements)")
    if choices is not None and scale is None:
        raise NotImplementedError("multiplies V:N:M weights of integers only")
    if choices is not None and values.shape[1] // choices.shape[1] % BLOCK_COLUMNS:
        raise NotImplementedError(f"multiplies V:N:M weights whose V is a multiple of {BLOCK_COLUMNS}")
    if activation_bits is not None and scale is None:
        raise NotImplementedError("rounds activations for integers only")
    native.load_library()
    kernel = functools.partial(_multiply, n, m, activation_bits)
    reference = functools.partial(sparse_matmul_reference, n=n, m=m)
    return differentiate_as(reference, kernel)(x, values, indices, scale, choices)


def _multiply(
    n: int,
    m: int,
    activation_bits: int | None,
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    scale: jax.Array | None,
    choices: jax.Array | None,
) -> jax.Array:
    *lead, contraction = x.shape
    columns = values.shape[1]
    rows = x.reshape(-1, contraction)
    call = jax.ffi.ffi_call(
        native.SPARSE_MATMUL,
        jax.ShapeDtypeStruct((rows.shape[0], columns), x.dtype),
        vmap_method="sequential",
    )
    # The target has a fixed number of operands: what is not there has no rows.
    given = jnp.zeros((0, columns), jnp.float32) if scale is None else scale
    chosen = jnp.zeros((0, columns), jnp.uint32) if choices is None else choices
    result = call(rows, values, indices, given, chosen, n=n, m=m, activation_bits=activation_bits or 0)
    return result.reshape(*lead, columns)
