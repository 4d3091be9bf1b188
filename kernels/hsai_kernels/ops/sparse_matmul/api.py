"""`sparse_matmul`: activations times a weight that keeps n of every m elements of its contraction: N:4, N:8 or V:N:M.

Dimensions: D contraction, F output, C = D*n/m kept elements a column, g dense positions that share a scale, V columns
that share their choice of 4 positions of every m.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import load_later, run_kernel
from hsai_kernels.ops.quantized_matmul.api import check_activation_bits, check_activations, check_scale
from hsai_kernels.ops.sparse_matmul.cpu import ARRAYS, sparse_matmul_cpu
from hsai_kernels.ops.sparse_matmul.reference import POSITION_BITS, sparse_matmul_reference
from hsai_kernels.options import is_int_of
from hsai_kernels.packing import count_elements
from hsai_kernels.stacks import check_layer, describe_layer, of_cut_layer
from hsai_kernels.together import Products, check_alike, of_each

BACKENDS: dict[str, Products] = {
    "cpu": sparse_matmul_cpu,
    "gpu": of_each(of_cut_layer(load_later("hsai_kernels.ops.sparse_matmul.gpu", "sparse_matmul_gpu")), ARRAYS),
    "reference": of_each(of_cut_layer(sparse_matmul_reference), ARRAYS),
    "tpu": of_each(of_cut_layer(load_later("hsai_kernels.ops.sparse_matmul.tpu", "sparse_matmul_tpu")), ARRAYS),
}


def sparse_matmul(
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    scale: jax.Array | None = None,
    choices: jax.Array | None = None,
    *,
    n: int,
    m: int,
    layer: jax.Array | None = None,
    activation_bits: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """x @ w, where w keeps n of every m consecutive elements of a column (N:M sparsity, Mishra et al. 2104.08378).

    With `choices` in two steps (V:N:M, VENOM, Castro et al. 2310.02065): V neighbouring columns keep the same 4 of
    every m positions, and each column n of those 4. So 2:8 has the indices of 2:4, and its product is that of a 2:4
    weight with activations that are gathered once for V columns.

    Differentiable by reverse mode in x, in floating values and in scale; integers have no gradient.

    Args:
      x: (..., D), float32 or bfloat16.
      values: float32, bfloat16 or int8 (C, F), or uint32 (C/8, F) of 4-bit integers in offset binary (value + 8).
        Kept element c of a column belongs to its sparsity group c // n.
      indices: the position of every kept element inside its group, ascending inside a group, packed as in packing.py:
        uint32 (C/16, F) of 2 bits, or for m = 8 without choices (3*C/32, F) of 3 bits.
      scale: (D/g, F) float32, bfloat16 or float16 for integers, where g counts dense positions and is a multiple of m;
        None for floating values.
      choices: for V:N:M, uint32 (D/32, F/V): bit i of word j says whether position 32*j + i is one of the 4 of its m
        that the V columns of a block may keep; indices count these 4. None for N:4 and N:8.
      n, m: kept elements and positions a group: n = 1, 2 or 3 of m = 4, n = 1, 2 or 4 of m = 8; with choices n = 1, 2
        or 3 of the 4 that are chosen of m = 8, 16 or 32.
      layer: int32 (), the number of a layer: the weight's arrays are then stacks (L, ...), as in quantized_matmul.
      activation_bits: None takes activations as they are, 8 rounds them first, as in quantized_matmul; for integers.
      implementation: "reference", "cpu" (native), "gpu" (Pallas Triton), "tpu" (Mosaic), or None for the platform's
        best.

    Returns:
      (..., F) in x's dtype, accumulated in float32.

    Raises:
      ValueError: shapes or dtypes that do not fit together, naming both; unknown implementation.
      NotImplementedError: the implementation was named and does not support this call.
    """
    given: dict[str, Any] = {"n": n, "m": m, "layer": layer, "activation_bits": activation_bits}
    return sparse_matmuls(x, [(values, indices, scale, choices)], implementation=implementation, **given)[0]


def sparse_matmuls(
    x: jax.Array,
    weights: Sequence[tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]],
    *,
    n: int,
    m: int,
    layer: jax.Array | None = None,
    activation_bits: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """`sparse_matmul` of x with several weights: values, indices, scale and choices of each.

    They may differ in their columns and V only, as those of `quantized_matmuls`.
    """
    check_activations("sparse_matmul", x)
    check_activation_bits(activation_bits)
    for values, indices, scale, choices in weights:
        _check_weight(x, values, indices, scale, choices, layer, n, m, activation_bits)
    check_alike("sparse_matmul", weights)
    options = {"layer": layer, "n": n, "m": m, "activation_bits": activation_bits}
    arrays = [array for weight in weights for array in weight]
    return run_kernel("sparse_matmul", BACKENDS, implementation, x, *arrays, **options)


def _check_weight(
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    scale: jax.Array | None,
    choices: jax.Array | None,
    layer: jax.Array | None,
    n: int,
    m: int,
    activation_bits: int | None,
) -> None:
    stacks = (values, indices, scale, choices)
    check_layer("sparse_matmul", layer, stacks)
    values, indices = describe_layer(values, layer), describe_layer(indices, layer)
    scale, choices = describe_layer(scale, layer), describe_layer(choices, layer)
    if not is_int_of(m, POSITION_BITS if choices is None else (8, 16, 32)):
        raise ValueError(f"m={m!r} is not supported: valid are 4 and 8 without choices, and 8, 16 and 32 with them")
    valid = (1, 2, 4) if choices is None and m == 8 else (1, 2, 3)
    if not is_int_of(n, valid):
        raise ValueError(f"n={n!r} of m={m} is not supported: valid are {', '.join(map(str, valid))}")
    if values.ndim != 2 or indices.ndim != 2:
        raise ValueError(f"sparse_matmul needs values and indices (rows, F), got {values.shape} and {indices.shape}")
    integer = values.dtype in (jnp.uint32, jnp.int8)
    if not integer and values.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"sparse_matmul has values of float32, bfloat16 or int8, or of uint32 (int4 words), not of {values.dtype}"
        )
    kept = values.shape[0] * (8 if values.dtype == jnp.uint32 else 1)
    if x.shape[-1] * n != kept * m:
        raise ValueError(f"x contracts over {x.shape[-1]}, but {kept} kept elements ({n}:{m}) make {kept * m / n:g}")
    if indices.dtype != jnp.uint32:
        raise ValueError(f"indices are uint32 words, not {indices.dtype}")
    bits = POSITION_BITS[m] if choices is None else 2
    if indices.shape[0] * 32 != kept * bits or kept % count_elements(bits):
        held = indices.shape[0] * 32 / bits
        raise ValueError(f"indices hold {held:g} positions of {bits} bits a column, values {kept}")
    if indices.shape[1] != values.shape[1]:
        raise ValueError(f"indices have {indices.shape[1]} columns, values have {values.shape[1]}")
    if integer != (scale is not None):
        raise ValueError(f"values of {values.dtype} {'need' if integer else 'take no'} scale")
    if scale is not None:
        check_scale(scale, x.shape[-1], values.shape[1])
        if x.shape[-1] // scale.shape[0] % m:
            raise ValueError(f"scale groups of {x.shape[-1] // scale.shape[0]} positions are no multiple of m={m}")
    if choices is not None:
        _check_choices(choices, x.shape[-1], values.shape[1])
    if activation_bits is not None and not integer:
        raise ValueError(f"activation_bits={activation_bits} is for integers, not for values of {values.dtype}")


def _check_choices(choices: jax.Array, contraction: int, columns: int) -> None:
    if choices.dtype != jnp.uint32 or choices.ndim != 2:
        raise ValueError(f"choices are uint32 words (D/32, F/V), not {choices.dtype}{choices.shape}")
    if choices.shape[0] * 32 != contraction:
        raise ValueError(f"choices hold {choices.shape[0] * 32} positions, x contracts over {contraction}")
    if choices.shape[1] == 0 or columns % choices.shape[1]:
        raise ValueError(f"{columns} columns do not divide into the {choices.shape[1]} blocks of choices")
