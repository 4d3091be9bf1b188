"""GPU backend of sparse_matmul: N:4, N:8 and V:N:M weights, decompressed in registers by Triton (gpu_product.py).

The win is bytes, and not operations: each group of m becomes its m dense columns on the chip, and the products are the
dense ones (the sparse tensor cores, which would save half of them for 2:4 only, are not Triton's to use). Of D * F
elements in bfloat16, 2 D F bytes when dense:
- 2:4 in bfloat16 keeps D F / 2 values of 2 bytes and 2 bits of position each: 1.125 D F bytes, 0.56 of dense;
- 1:4 in bfloat16 takes half of that, 0.28 of dense; 3:4 takes 0.84;
- 2:4 in int4 takes half a byte and 2 bits for each of D F / 2, and a float32 scale for every g dense positions: with
  g = 32 0.5 D F bytes, a quarter of dense, where dense int4 takes 0.31. With g = 128, 0.41 against 0.53 D F bytes.
With groups of 8 a position has 3 bits: 4:8 in bfloat16 takes 1.19 D F bytes, 4:8 in int4 with g = 32 0.56 D F.
So decoding, which is bound by bytes, gains; prefill, which is bound by products, does not.

V:N:M gains in products too. The 4 positions that V columns chose of every m are found from the bits of their words, and
each program loads the activations that stand there, and no other: what is left is a product with an N:4 weight over
4 D / m positions. So 2:8 takes a half of the dense product's operations, 2:16 a quarter, 2:32 an eighth, and of bytes:
- 64:2:8 in bfloat16 keeps D F / 4 values of 2 bytes and 2 bits each, and a bit of every position for 64 columns:
  0.56 D F bytes, 0.28 of dense; 64:2:16 takes 0.14, 64:2:32 0.07 of dense;
- 64:2:8 in int4 with g = 64: 0.19 D F bytes of codes and positions, 0.03 of bfloat16 scales: 0.22 D F, 0.11 of dense.
The price is that activations are loaded one by one, not side by side: they come as (D, R), so that each is a row of R
numbers in the second cache. In decoding (R = 1) a program reads for each of its weights' bytes few of them: of 64:2:8
in bfloat16, 64 columns of a group have 288 bytes, and 4 activations 8.
A tile lies in one block of V columns, and a product has 16 at least: narrower blocks are left to plain jax.

Dimensions: D contraction, F output, C = D*n/m kept elements a column, g dense positions that share a scale, R rows, V
columns that choose 4 of every m positions together.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from hsai_kernels.dispatch import check_platform
from hsai_kernels.gpu_product import Chosen, ProductTile, multiply_compressed
from hsai_kernels.gradients import differentiate_as
from hsai_kernels.ops.quantized_matmul.reference import INT4_ZERO
from hsai_kernels.ops.sparse_matmul.choices import CHOSEN, check_width, find_places, take_group
from hsai_kernels.ops.sparse_matmul.reference import POSITION_BITS, sparse_matmul_reference
from hsai_kernels.triton_blocks import load_elements, load_matrix


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
    if values.dtype == jnp.int8:
        raise NotImplementedError("has floating values and int4 words, not int8 values")
    if activation_bits is not None:
        raise NotImplementedError(f"takes activations as they are, not rounded to {activation_bits} bits")
    if x.size == 0 or values.size == 0:
        raise NotImplementedError(f"multiplies what is not empty, not x {x.shape} and values {values.shape}")
    if choices is not None:
        check_width(values.shape[1], choices.shape[1])
    # The gradient rebuilds the dense weight: XLA's product then serves x, the values and the scales.
    reference = functools.partial(sparse_matmul_reference, n=n, m=m)
    return differentiate_as(reference, functools.partial(_multiply, n, m, tile))(x, values, indices, scale, choices)


def _multiply(
    n: int,
    m: int,
    tile: ProductTile | None,
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    scale: jax.Array | None,
    choices: jax.Array | None,
) -> jax.Array:
    columns = values.shape[1]
    rows = x.reshape(-1, x.shape[-1])
    kind = "int4" if values.dtype == jnp.uint32 else values.dtype.name
    if choices is None:
        kernel, group, chosen = f"sparse_matmul {n}:{m} {kind}", m, None
    else:
        kernel, group = f"sparse_matmul V:{n}:{m} {kind}", CHOSEN
        chosen = Chosen(choices=choices, span=m, find=functools.partial(_find_chosen, m))
    read = functools.partial(_read_groups, n, group)
    out = multiply_compressed(kernel, read, group, rows, (values, indices), scale, columns, tile, chosen)
    return out.reshape(*x.shape[:-1], columns)


def _find_chosen(
    m: int, choices: jax.Array, unit: jax.Array, there: jax.Array, block: jax.Array
) -> tuple[jax.Array, ...]:
    """A unit is a group of m positions, with a bit for each in words (D/32, F/V): the 4 that are set."""
    first = unit * m
    at: Any = choices.at[jax.lax.div(first, jnp.int32(32)), block]
    word = plgpu.load(at, mask=there, other=0)
    places = find_places(take_group(word, jax.lax.rem(first, jnp.int32(32)), m), m)
    return tuple(first + place for place in places)


def _read_groups(
    n: int, m: int, refs: tuple[jax.Array, ...], unit: jax.Array, column: jax.Array, real: jax.Array | None
) -> tuple[jax.Array, ...]:
    """A unit is a group: its m dense positions, of which n are not zero."""
    values, indices = refs
    dense: list[jax.Array] = [jnp.zeros((unit.shape[0], column.shape[0]), jnp.float32)] * m
    for kept in range(n):
        element = unit * n + kept
        if values.dtype == jnp.uint32:
            value = load_elements(values, 4, element, column, real).astype(jnp.float32) - INT4_ZERO
        else:
            value = load_matrix(values, element, column, real).astype(jnp.float32)
        position = load_elements(indices, POSITION_BITS[m], element, column, real)
        # Ascending and distinct: this one stands at `kept` to m - n + `kept`, and no other is there.
        for at in range(kept, m - n + kept + 1):
            dense[at] = jnp.where(position == at, value, dense[at])
    return tuple(dense)
