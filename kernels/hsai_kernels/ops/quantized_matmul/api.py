"""`quantized_matmul`: activations times a weight of int8 values or words of few-bit codes, with scales.

Dimensions: D contraction, F output, g contraction positions that share a scale.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import load_later, run_kernel
from hsai_kernels.ops.quantized_matmul.cpu import ARRAYS, quantized_matmul_cpu
from hsai_kernels.ops.quantized_matmul.reference import quantized_matmul_reference
from hsai_kernels.options import is_int_of
from hsai_kernels.packing import BLOCKS
from hsai_kernels.stacks import check_layer, describe_layer, of_cut_layer
from hsai_kernels.together import Products, check_alike, of_each

BACKENDS: dict[str, Products] = {
    "cpu": quantized_matmul_cpu,
    "gpu": of_each(of_cut_layer(load_later("hsai_kernels.ops.quantized_matmul.gpu", "quantized_matmul_gpu")), ARRAYS),
    "reference": of_each(of_cut_layer(quantized_matmul_reference), ARRAYS),
    "tpu": of_each(of_cut_layer(load_later("hsai_kernels.ops.quantized_matmul.tpu", "quantized_matmul_tpu")), ARRAYS),
}


def quantized_matmul(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    minimum: jax.Array | None = None,
    *,
    layer: jax.Array | None = None,
    bits: int = 4,
    centered: bool = False,
    activation_bits: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """x @ w, where w = values * scale for int8 values, and w = (code - zero) * scale for packed words.

    zero is 2**(bits - 1), so that 4-bit codes stand for -8..7, 3-bit ones for -4..3, 2-bit ones for -2..1; ternary
    weights are the 2-bit codes 1, 2 and 3 of -1, 0 and 1. Centered, it is (2**bits - 1) / 2: 3-bit codes stand for
    -7/2, -5/2, ... 7/2, 2-bit ones for -3/2, -1/2, 1/2 and 3/2.

    With `minimum`, w = code * scale + minimum: 4-bit codes count from a minimum of their group, and there is no zero.

    Differentiable in x, scale and minimum by reverse mode; the values are integers, and have no gradient.

    Args:
      x: (..., D), float32 or bfloat16.
      values: int8 (D, F), or uint32 (D * bits / 32, F) holding codes as packing.py says.
      scale: (D/g, F), float32, bfloat16 or float16; (1, F) is one scale a column.
      minimum: as scale, of its dtype, for codes of 4 bits; None where codes have a zero.
      layer: int32 (), the number of a layer: values, scale and minimum are then stacks (L, ...) of such arrays. The CPU
        reads the layer where it lies, the others cut it out.
      bits: of a code in uint32 words, 4, 3 or 2; int8 values have no choice.
      centered: puts zero in the middle of the codes; int8 values have it there.
      activation_bits: None takes activations as they are. 8 rounds them first, every row's group of positions that
        shares a scale of the weight with a step of its own (`round_activations`): products are then of integers. The
        gradient is that of the product without rounding.
      implementation: "reference", "cpu" (native), "gpu" (Pallas Triton), "tpu" (Mosaic), or None for the platform's
        best.

    Returns:
      (..., F) in x's dtype, accumulated in float32.

    Raises:
      ValueError: shapes or dtypes that do not fit together, naming both; unknown implementation.
      NotImplementedError: the implementation was named and does not support this call.
    """
    given: dict[str, Any] = {"layer": layer, "bits": bits, "centered": centered, "activation_bits": activation_bits}
    return quantized_matmuls(x, [(values, scale, minimum)], implementation=implementation, **given)[0]


def quantized_matmuls(
    x: jax.Array,
    weights: Sequence[tuple[jax.Array, jax.Array, jax.Array | None]],
    *,
    layer: jax.Array | None = None,
    bits: int = 4,
    centered: bool = False,
    activation_bits: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """`quantized_matmul` of x with several weights: values, scale and minimum of each.

    They may differ in their columns only: one format, and groups of one size. On a CPU they are one call, which reads
    the activations once and whose threads meet once.
    """
    check_activations("quantized_matmul", x)
    check_activation_bits(activation_bits)
    for values, scale, minimum in weights:
        _check_weight(x, values, scale, minimum, layer, bits, centered)
    check_alike("quantized_matmul", weights)
    options = {"layer": layer, "bits": bits, "centered": centered, "activation_bits": activation_bits}
    arrays = [array for weight in weights for array in weight]
    return run_kernel("quantized_matmul", BACKENDS, implementation, x, *arrays, **options)


def _check_weight(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    minimum: jax.Array | None,
    layer: jax.Array | None,
    bits: int,
    centered: bool,
) -> None:
    stacks = (values, scale, minimum)
    check_layer("quantized_matmul", layer, stacks)
    values, scale = describe_layer(values, layer), describe_layer(scale, layer)
    minimum = describe_layer(minimum, layer)
    if values.ndim != 2:
        raise ValueError(f"quantized_matmul needs values (rows, F), got {values.shape}")
    if values.dtype == jnp.int8:
        if centered:
            raise ValueError("centered=True is for words of codes, and values are int8")
        contraction = values.shape[0]
    elif values.dtype == jnp.uint32:
        if not is_int_of(bits, BLOCKS):
            raise ValueError(f"quantized_matmul has words of codes of 2, 3 or 4 bits, not of {bits!r}")
        if values.shape[0] * 32 % bits:
            raise ValueError(f"words of {bits} bits come by threes, and values have {values.shape[0]} rows")
        contraction = values.shape[0] * 32 // bits
    else:
        raise ValueError(
            f"quantized_matmul has values of int8, or of uint32 (words of 2, 3 or 4 bits), not of {values.dtype}"
        )
    if x.shape[-1] != contraction:
        raise ValueError(f"x contracts over {x.shape[-1]}, the weight over {contraction} ({values.dtype})")
    check_scale(scale, contraction, values.shape[1])
    if minimum is not None:
        if values.dtype == jnp.int8 or bits != 4 or centered:
            raise ValueError(
                "minimum is for words of 4-bit codes that are not centered, "
                f"not for {values.dtype}, {bits=}, {centered=}"
            )
        if minimum.shape != scale.shape or minimum.dtype != scale.dtype:
            raise ValueError(
                f"minimum is {minimum.dtype}{minimum.shape}, scale {scale.dtype}{scale.shape}: they must be alike"
            )


def check_activation_bits(bits: int | None) -> None:
    """Raises ValueError unless activations are to stay as they are, or to be rounded to int8."""
    if bits is not None and not is_int_of(bits, (8,)):
        raise ValueError(f"activation_bits={bits!r} is not supported: valid are 8 and None")


def check_activations(kernel: str, x: jax.Array) -> None:
    """Raises ValueError unless x is (..., D) of float32 or bfloat16."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"{kernel} has activations of float32 or bfloat16, not of {x.dtype}")
    if x.ndim == 0:
        raise ValueError(f"{kernel} needs x (..., D), got a scalar")


def check_scale(scale: jax.Array, contraction: int, columns: int) -> None:
    """Raises ValueError unless scale is (D/g, F) with a whole g, of float32, bfloat16 or float16.

    Whether its numbers are finite is not asked: while tracing nobody knows, and otherwise every call would wait for the
    device. Who packs a weight or reads one asks (hsai/formats does both times); a NaN here is one in its column.
    """
    if scale.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"scales are float32, bfloat16 or float16, not {scale.dtype}")
    if scale.ndim != 2:
        raise ValueError(f"scale must be (groups of {contraction} positions, {columns}), got {scale.shape}")
    if scale.shape[0] == 0 or contraction % scale.shape[0]:
        raise ValueError(f"a contraction over {contraction} does not divide into {scale.shape[0]} groups of scales")
    if scale.shape[1] != columns:
        raise ValueError(f"scale has {scale.shape[1]} columns, values have {columns}")
