"""GPU backend of sparse_matmul: N:4 and N:8 weights, decompressed in registers by Pallas Triton (gpu_product.py).

The win is bytes, and not operations: each group of m becomes its m dense columns on the chip, and the products are the
dense ones (the sparse tensor cores, which would save half of them for 2:4 only, are not Triton's to use). Of D * F
elements in bfloat16, 2 D F bytes when dense:
- 2:4 in bfloat16 keeps D F / 2 values of 2 bytes and 2 bits of position each: 1.125 D F bytes, 0.56 of dense;
- 1:4 in bfloat16 takes half of that, 0.28 of dense; 3:4 takes 0.84;
- 2:4 in int4 takes half a byte and 2 bits for each of D F / 2, and a float32 scale for every g dense positions: with
  g = 32 0.5 D F bytes, a quarter of dense, where dense int4 takes 0.31. With g = 128, 0.41 against 0.53 D F bytes.
With groups of 8 a position has 3 bits: 4:8 in bfloat16 takes 1.19 D F bytes, 4:8 in int4 with g = 32 0.56 D F.
So decoding, which is bound by bytes, gains; prefill, which is bound by products, does not.

Dimensions: D contraction, F output, C = D*n/m kept elements a column, g dense positions that share a scale.
"""

import functools

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import check_platform
from hsai_kernels.gpu_product import ProductTile, multiply_compressed
from hsai_kernels.gradients import differentiate_as
from hsai_kernels.ops.quantized_matmul.reference import INT4_ZERO
from hsai_kernels.ops.sparse_matmul.reference import sparse_matmul_reference
from hsai_kernels.packing import count_elements, find_halves, find_shift
from hsai_kernels.triton_blocks import load_matrix


def sparse_matmul_gpu(
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    scale: jax.Array | None,
    choices: jax.Array | None = None,
    *,
    n: int,
    m: int,
    activation_bits: int | None = None,
    tile: ProductTile | None = None,
) -> jax.Array:
    """(..., F) = x (..., D) @ weight; arguments as in api.py, already validated.

    Sums are float32, and float32 activations are multiplied exactly; floating values are rounded to x's dtype, and so
    are scaled ones, except that int4 stays exact where a block lies in one scale group.
    `tile` is for tests. Raises NotImplementedError for what it does not support.
    """
    check_platform("gpu")
    if choices is not None:
        raise NotImplementedError(f"multiplies n:4 and n:8 weights, not V:{n}:{m}")
    if values.dtype == jnp.int8:
        raise NotImplementedError("has floating values and int4 words, not int8 values")
    if activation_bits is not None:
        raise NotImplementedError(f"takes activations as they are, not rounded to {activation_bits} bits")
    if x.size == 0 or values.size == 0:
        raise NotImplementedError(f"multiplies what is not empty, not x {x.shape} and values {values.shape}")
    # The gradient rebuilds the dense weight: XLA's product then serves x, the values and the scales.
    reference = functools.partial(sparse_matmul_reference, n=n, m=m)
    return differentiate_as(reference, functools.partial(_multiply, n, m, tile))(x, values, indices, scale)


def _multiply(
    n: int,
    m: int,
    tile: ProductTile | None,
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    scale: jax.Array | None,
) -> jax.Array:
    columns = values.shape[1]
    rows = x.reshape(-1, x.shape[-1])
    read = functools.partial(_read_groups, n, m)
    kernel = f"sparse_matmul {n}:{m} {'int4' if values.dtype == jnp.uint32 else values.dtype.name}"
    out = multiply_compressed(kernel, read, m, rows, (values, indices), scale, columns, tile)
    return out.reshape(*x.shape[:-1], columns)


def _read_groups(
    n: int, m: int, refs: tuple[jax.Array, ...], unit: jax.Array, column: jax.Array, real: jax.Array | None
) -> tuple[jax.Array, ...]:
    """A unit is a group: its m dense positions, of which n are not zero.

    Neighbouring kept elements share words: they are loaded again for each, from the first cache and not from memory.
    """
    values, indices = refs
    dense: list[jax.Array] = [jnp.zeros((unit.shape[0], column.shape[0]), jnp.float32)] * m
    for kept in range(n):
        element = unit * n + kept
        if values.dtype == jnp.uint32:
            value = _load_elements(values, 4, element, column, real).astype(jnp.float32) - INT4_ZERO
        else:
            value = load_matrix(values, element, column, real).astype(jnp.float32)
        position = _load_positions(indices, m, element, column, real)
        dense = [other + jnp.where(position == at, value, 0.0) for at, other in enumerate(dense)]
    return tuple(dense)


def _load_positions(ref: jax.Array, m: int, element: jax.Array, column: jax.Array, real: jax.Array | None) -> jax.Array:
    """int32 (u, f): positions in their groups of elements (u,) of columns (f,), of 2 or 3 bits."""
    if m == 4:
        return _load_elements(ref, 2, element, column, real)
    first = jax.lax.div(element, jnp.int32(32)) * 3
    (low, low_shift), (high, high_shift) = find_halves(jax.lax.rem(element, jnp.int32(32)))
    lower = load_matrix(ref, first + low, column, real) >> low_shift.astype(jnp.uint32)[:, None]
    upper = load_matrix(ref, first + high, column, real) >> high_shift.astype(jnp.uint32)[:, None]
    return ((lower & jnp.uint32(3)) | ((upper & jnp.uint32(1)) << jnp.uint32(2))).astype(jnp.int32)


def _load_elements(
    ref: jax.Array, bits: int, element: jax.Array, column: jax.Array, real: jax.Array | None
) -> jax.Array:
    """int32 (u, f): packed elements (u,) of columns (f,)."""
    a_word = count_elements(bits)
    words = load_matrix(ref, jax.lax.div(element, jnp.int32(a_word)), column, real)
    shift = find_shift(jax.lax.rem(element, jnp.int32(a_word)), bits).astype(jnp.uint32)
    return ((words >> shift[:, None]) & jnp.uint32(2**bits - 1)).astype(jnp.int32)
