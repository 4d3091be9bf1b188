"""TPU backend of sparse_matmul (Pallas, Mosaic): N:4 and N:8 weights are made dense in fast memory.

The matrix unit has no use for zeros, so that flops are those of a dense product; the win is bytes. With n of 4 kept, an
element of the dense weight costs n/4 values and n/4 indices of 2 bits. For 2:4: bfloat16 8 + 1 = 9 bits where dense has
16 (1.8 times fewer), int4 2 + 1 = 3 bits and the scales, where dense int4 has 4 (1.3 times fewer) and bfloat16 16 (5.3
times). For 1:4: 4.5 bits, and 1.5. With n of 8 an index has 3 bits: 4:8 takes 9.5 bits, and 3.5.

Decoding does not gain these factors, for operations bound it, not bytes. Counted and not measured: a kept element takes
the vector unit 4 in int4 (shift, mask, conversion, offset) or 1 in bfloat16 (widening), and 2 for its index (of 3 bits
6); a group n (m - n + 1) comparisons and as many selections; a position 1 for rounding, and 1 for its scale. For 2:4
that is 8 an element in int4 and 5.5 in bfloat16: at 4,096 lanes and 870 bytes of HBM a cycle (v5e) the time of 1.7 and
1.2 bytes, where 0.4 and 1.1 are stored. Of a block of 1024 x 512 by itself, for 16 rows, libtpu 0.0.42 schedules 1,040
bundles in int4 and 1,140 in bfloat16, whose strided loads come in parts (found as in tpu_chosen.py): the time of 1.7
and 1.9 bytes an element. Of 1:4 it is 1.2 and 0.9, of 4:8 2.6 and 3.4, of dense int4 1.2; dense bfloat16 reads 2. So
1:4 in bfloat16 may be twice as fast as dense, 2:4 is slower than dense int4 and about as fast as dense bfloat16, and
4:8 is slower than either: what they save for certain is memory.

Of V:N:M weights the activations are chosen, and what is left is N:4 (tpu_chosen.py).

Dimensions: D contraction, F output, C kept elements a column, J planes (tpu_product.py), U rows a plane.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import check_platform
from hsai_kernels.gradients import differentiate_as
from hsai_kernels.ops.quantized_matmul.reference import INT4_ZERO
from hsai_kernels.ops.quantized_matmul.tpu import take_element
from hsai_kernels.ops.quantized_matmul.tpu_product import Packing, load_strided, multiply_packed
from hsai_kernels.ops.sparse_matmul.choices import CHOSEN, check_width
from hsai_kernels.ops.sparse_matmul.reference import POSITION_BITS, sparse_matmul_reference
from hsai_kernels.ops.sparse_matmul.tpu_chosen import multiply_chosen
from hsai_kernels.packing import count_elements


def sparse_matmul_tpu(
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    scale: jax.Array | None,
    choices: jax.Array | None = None,
    *,
    n: int,
    m: int,
    activation_bits: int | None = None,
) -> jax.Array:
    """(..., F) = x (..., D) @ weight; arguments as in api.py, already validated.

    Weights are rounded to x's dtype, as the reference does; sums are float32. The gradients are the reference's, which
    rebuilds the dense weight. Raises NotImplementedError for what it does not support.
    """
    check_platform("tpu")
    if values.dtype == jnp.int8:
        raise NotImplementedError("has floating values and int4 words, not int8 values")
    if activation_bits is not None:
        raise NotImplementedError(f"takes activations as they are, not rounded to {activation_bits} bits")
    if choices is not None:
        check_width(values.shape[1], choices.shape[1])
    reference = functools.partial(sparse_matmul_reference, n=n, m=m)
    return differentiate_as(reference, functools.partial(_multiply, n, m))(x, values, indices, scale, choices)


def _multiply(
    n: int,
    m: int,
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    scale: jax.Array | None,
    choices: jax.Array | None,
) -> jax.Array:
    kind = "int4" if values.dtype == jnp.uint32 else values.dtype.name
    packed = (values, indices)
    if choices is None:
        return multiply_packed(f"sparse_matmul {n}:{m} {kind}", choose_packing(n, m, values), x, packed, scale)
    packing = choose_packing(n, CHOSEN, values)
    return multiply_chosen(f"sparse_matmul V:{n}:{m} {kind}", packing, m, x, packed, scale, choices)


def choose_packing(n: int, m: int, values: jax.Array | jax.ShapeDtypeStruct) -> Packing:
    """How values of that dtype, and their indices, are packed: a period ends with a word of indices."""
    bits = POSITION_BITS[m]
    packed = values.dtype == jnp.uint32
    return Packing(
        # Of 3:4, a word of indices ends within a group.
        period=64 if n == 3 else count_elements(bits) * m // n,
        load_planes=functools.partial(_load_dense, n, m),
        rows=((n, 8 * m) if packed else (n, m), (bits * n, 32 * m)),
        floating=not packed,
    )


def _load_dense(n: int, m: int, planes: int, packed: list[Any]) -> list[jax.Array]:
    """Plane j holds position j % m of the sparsity groups j // m, j // m + J / m, ..."""
    values, indices = packed
    count = planes * n // m
    words = load_strided(indices, count * POSITION_BITS[m] // 32)
    kept = _load_kept(values, count)
    places = [take_element(words, POSITION_BITS[m], c) for c in range(count)]
    dense = []
    for j in range(planes):
        group, position = j // m * n, j % m
        # Ascending and distinct: the i-th of a group stands at i to m - n + i, and at most one is here.
        built = jnp.zeros_like(kept[0])
        for i in range(max(0, position - m + n), min(position + 1, n)):
            built = jnp.where(places[group + i] == position, kept[group + i], built)
        dense.append(built)
    return dense


def _load_kept(values: Any, count: int) -> list[jax.Array]:
    """float32: for each of the first `count` kept elements of a column, it and every count-th after it."""
    if values.dtype == jnp.uint32:
        words = load_strided(values, count // 8)
        return [take_element(words, 4, c).astype(jnp.float32) - INT4_ZERO for c in range(count)]
    return load_strided(values, count)
