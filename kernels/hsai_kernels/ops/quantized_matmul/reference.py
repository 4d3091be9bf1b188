"""Products with int8 and int4 weights in plain jax.numpy: rebuild the dense weight, then multiply.

`dequantize_int8` and `dequantize_int4` define what the packed arrays mean; formats use them to densify.

Dimensions: D contraction, F output, g contraction positions that share a scale.
"""

import jax
import jax.numpy as jnp

from hsai_kernels.packing import unpack_words

INT4_ZERO = 8
"""int4 is stored in offset binary: the nibble is the value plus this, so that -8..7 is stored as 0..15."""


def dequantize_int8(values: jax.Array, scale: jax.Array) -> jax.Array:
    """float32 (..., D, F) from int8 values (..., D, F) and scale (..., D/g, F); one scale a column is D/g = 1."""
    return scale_groups(values.astype(jnp.float32), scale)


def dequantize_int4(words: jax.Array, scale: jax.Array) -> jax.Array:
    """float32 (..., D, F) from uint32 words (..., D/8, F), packed as in packing.py, and scale (..., D/g, F)."""
    return scale_groups(decode_int4(words), scale)


def decode_int4(words: jax.Array) -> jax.Array:
    """float32 (..., D, F): the integers -8..7 that uint32 words (..., D/8, F) hold, without scale."""
    return unpack_words(words, 4).astype(jnp.float32) - INT4_ZERO


def scale_groups(integers: jax.Array, scale: jax.Array) -> jax.Array:
    """float32 (..., D, F): each of the D/g groups of consecutive rows times its row of scale (..., D/g, F)."""
    *lead, rows, columns = integers.shape
    groups = scale.shape[-2]
    if groups == 0 or rows % groups:
        raise ValueError(f"{rows} rows do not divide into {groups} groups of scales")
    split = integers.reshape(*lead, groups, rows // groups, columns)
    scaled = split * scale.astype(jnp.float32)[..., :, None, :]
    return scaled.reshape(*lead, rows, columns)


def quantized_matmul_reference(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """(..., F) = x (..., D) @ dequantized weight; arguments as in api.py, already validated.

    The weight is rounded to x's dtype, as a dense model's would be; products are summed in float32.
    """
    dequantize = dequantize_int8 if values.dtype == jnp.int8 else dequantize_int4
    weight = dequantize(values, scale).astype(x.dtype)
    return jnp.matmul(x, weight, preferred_element_type=jnp.float32).astype(x.dtype)
