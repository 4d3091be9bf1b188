"""Products with int8 weights and codes of few bits in plain jax.numpy: rebuild the dense weight, then multiply.

`dequantize_int8` and `dequantize_words` define what the packed arrays mean; formats use them to densify.

Dimensions: D contraction, F output, g contraction positions that share a scale.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hsai_kernels.gradients import differentiate_as
from hsai_kernels.packing import unpack_words

INT4_ZERO = 8
"""4-bit codes are stored in offset binary: the code is the integer plus this, so that -8..7 is stored as 0..15."""


def dequantize_int8(values: jax.Array, scale: jax.Array) -> jax.Array:
    """float32 (..., D, F) from int8 values (..., D, F) and scale (..., D/g, F); one scale a column is D/g = 1."""
    return scale_groups(values.astype(jnp.float32), scale)


def dequantize_words(
    words: jax.Array, scale: jax.Array, bits: int, *, minimum: jax.Array | None = None, centered: bool = False
) -> jax.Array:
    """float32 (..., D, F): (code - zero) * scale, or code * scale + minimum.

    Args:
      words: uint32 (..., D * bits / 32, F) of codes, packed as in packing.py.
      scale: (..., D/g, F).
      bits: of a code.
      minimum: (..., D/g, F), or None.
      centered: which code is zero, see `find_zero`.
    """
    codes = unpack_words(words, bits).astype(jnp.float32)
    if minimum is None:
        return scale_groups(codes - find_zero(bits, centered), scale)
    if minimum.shape != scale.shape:
        raise ValueError(f"minima {minimum.shape} and scales {scale.shape} must be alike")
    scaled = scale_groups(codes, scale)
    return scaled + jnp.repeat(minimum.astype(jnp.float32), scaled.shape[-2] // scale.shape[-2], axis=-2)


def find_zero(bits: int, centered: bool) -> float:
    """The code that stands for zero: 2**(bits - 1), or, centered, the middle between that and the one below it.

    Centered levels are as many above zero as below, at 1/2, 3/2, ... of the scale, and none is zero itself.
    """
    return (2**bits - 1) / 2 if centered else float(2 ** (bits - 1))


def decode_words(words: jax.Array, bits: int) -> jax.Array:
    """int8 (..., D, F): the integers that uint32 words (..., D * bits / 32, F) hold, without scale.

    Codes are in offset binary, the integer plus 2**(bits - 1): 4-bit ones stand for -8..7, 2-bit ones for -2..1.
    """
    return unpack_words(words, bits).astype(jnp.int8) - jnp.int8(1 << (bits - 1))


def scale_groups(integers: jax.Array, scale: jax.Array) -> jax.Array:
    """float32 (..., D, F): each of the D/g groups of consecutive rows times its row of scale (..., D/g, F)."""
    *lead, rows, columns = integers.shape
    groups = scale.shape[-2]
    if groups == 0 or rows % groups:
        raise ValueError(f"{rows} rows do not divide into {groups} groups of scales")
    split = integers.reshape(*lead, groups, rows // groups, columns)
    scaled = split * scale.astype(jnp.float32)[..., :, None, :]
    return scaled.reshape(*lead, rows, columns)


def round_activations(x: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """Activations as int8 codes, with a step for each of `groups` groups of every row.

    Args:
      x: (..., D).
    Returns: codes int8 (..., groups, D/groups) in [-127, 127], step float32 (..., groups) = max|x| / 127 of the group,
      which is no number where one in the group is none.
    """
    split = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    # As bits, whose order has NaN above all numbers: XLA on a CPU (jax 0.10.2) loses it in a long row's maximum.
    bits = jax.lax.bitcast_convert_type(jnp.abs(split), jnp.int32)
    step = jax.lax.bitcast_convert_type(jnp.max(bits, axis=-1), jnp.float32) / 127.0
    codes = jnp.round(split / jnp.where(step > 0.0, step, jnp.inf)[..., None])
    return codes.astype(jnp.int8), step


def multiply_codes(x: jax.Array, codes: jax.Array, scale: jax.Array, minimum: jax.Array | None = None) -> jax.Array:
    """(..., F): x (..., D), rounded to int8 a group, times int8 codes (D, F) with scale (D/g, F), in x's dtype; codes
    count from minimum (D/g, F) if there is one."""
    groups, columns = scale.shape
    rounded, step = round_activations(x, groups)
    products = jnp.einsum(
        "...gk,gkf->...gf", rounded, codes.reshape(groups, -1, columns), preferred_element_type=jnp.int32
    )
    scaled = products.astype(jnp.float32) * step[..., None] * scale.astype(jnp.float32)
    if minimum is not None:
        totals = jnp.sum(rounded.astype(jnp.int32), axis=-1).astype(jnp.float32) * step
        scaled += totals[..., None] * minimum.astype(jnp.float32)
    return jnp.sum(scaled, axis=-2).astype(x.dtype)


def add_minimum(
    multiply: Callable[..., jax.Array], x: jax.Array, values: jax.Array, scale: jax.Array, minimum: jax.Array
) -> jax.Array:
    """x @ (code * scale + minimum) by a kernel of (x, values, scale, minimum) that knows 4-bit codes with their zero.

    w = (code - zero) * scale + (minimum + zero * scale), and the latter is one number for all positions of a group: its
    part of the product is that of the groups' sums of x, 1 / g of the work.
    """
    offset = minimum.astype(jnp.float32) + INT4_ZERO * scale.astype(jnp.float32)
    totals = jnp.sum(x.reshape(*x.shape[:-1], offset.shape[0], -1).astype(jnp.float32), axis=-1)
    part = jnp.matmul(totals, offset, precision=jax.lax.Precision.HIGHEST)
    return (multiply(x, values, scale, None).astype(jnp.float32) + part).astype(x.dtype)


def quantized_matmul_reference(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    minimum: jax.Array | None = None,
    *,
    bits: int = 4,
    centered: bool = False,
    activation_bits: int | None = None,
) -> jax.Array:
    """(..., F) = x (..., D) @ dequantized weight; arguments as in api.py, already validated.

    The weight is rounded to x's dtype, as a dense model's would be; products are summed in float32.
    """
    if activation_bits is not None:
        reference = functools.partial(quantized_matmul_reference, bits=bits, centered=centered)
        rounded = functools.partial(_multiply_rounded, bits, centered)
        return differentiate_as(reference, rounded)(x, values, scale, minimum)
    if values.dtype == jnp.int8:
        weight = dequantize_int8(values, scale)
    else:
        weight = dequantize_words(values, scale, bits, minimum=minimum, centered=centered)
    return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


def _multiply_rounded(
    bits: int, centered: bool, x: jax.Array, values: jax.Array, scale: jax.Array, minimum: jax.Array | None
) -> jax.Array:
    if minimum is not None:
        return multiply_codes(x, unpack_words(values, bits).astype(jnp.int8), scale, minimum)
    if values.dtype == jnp.int8:
        return multiply_codes(x, values, scale)
    if not centered:
        return multiply_codes(x, decode_words(values, bits), scale)
    # Halves of a level are odd integers.
    halves = 2 * unpack_words(values, bits).astype(jnp.int8) - jnp.int8(2**bits - 1)
    return multiply_codes(x, halves, scale.astype(jnp.float32) / 2)
