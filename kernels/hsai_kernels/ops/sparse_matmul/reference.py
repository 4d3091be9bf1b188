"""Products with N:M sparse weights in plain jax.numpy: rebuild the dense weight, then multiply.

`densify_nm` defines what the packed arrays mean; formats use it to densify.

Dimensions: D contraction, F output, C = D*n/m kept elements a column, m positions a sparsity group of which n are kept,
g dense positions that share a scale, V columns that share their choice of 4 positions of every m (V:N:M).
"""

import functools

import jax
import jax.numpy as jnp

from hsai_kernels.gradients import differentiate_as
from hsai_kernels.ops.quantized_matmul.reference import decode_words, multiply_codes, scale_groups
from hsai_kernels.packing import unpack_words

POSITION_BITS = {4: 2, 8: 3}
"""Bits of a kept element's position in its group of m."""


def densify_nm(
    values: jax.Array,
    indices: jax.Array,
    scale: jax.Array | None,
    n: int,
    m: int,
    size: int,
    choices: jax.Array | None = None,
) -> jax.Array:
    """float32 (..., size, F) from the kept elements of an N:M sparse weight; what was pruned is zero.

    Args:
      values: floating or int8 (..., C, F), or uint32 (..., C/8, F) int4 words; kept element c belongs to sparsity group
        c // n.
      indices: the position of each kept element inside its group, packed as in packing.py: uint32 (..., C/16, F) of
        2 bits for m = 4, (..., 3*C/32, F) of 3 bits for m = 8.
      scale: (..., size/g, F) for integers, else None.
      n, m: kept elements, positions a group; m is 4 or 8 without `choices`.
      size: the dense length D of the contraction.
      choices: for V:N:M, uint32 (..., size/32, F/V): bit i of word j says whether position 32*j + i may be kept in the
        V columns of a block. It is set 4 times in each m, and indices count these 4 only.

    Raises:
      ValueError: m is none of these, the kept count is not size * n / m, or shapes do not fit.
    """
    if choices is not None:
        return _spread(densify_nm(values, indices, scale, n, 4, size * 4 // m), choices, m, size)
    if m not in POSITION_BITS:
        raise ValueError(f"m={m} has no positions: valid are {', '.join(map(str, POSITION_BITS))}")
    kept = (decode_words(values, 4) if values.dtype == jnp.uint32 else values).astype(jnp.float32)
    *lead, count, columns = kept.shape
    if count * m != size * n:
        raise ValueError(f"{count} kept elements do not make {n}:{m} of {size}")
    if scale is not None:
        kept = scale_groups(kept, scale)
    split = kept.reshape(*lead, size // m, n, 1, columns)
    positions = unpack_words(indices, POSITION_BITS[m]).reshape(*lead, size // m, n, 1, columns)
    # Comparing instead of scattering: XLA fuses it into one pass, on every platform.
    chosen = positions == jnp.arange(m, dtype=jnp.uint8)[:, None]
    return jnp.sum(jnp.where(chosen, split, 0.0), axis=-3).reshape(*lead, size, columns)


def densify_bits(
    values: jax.Array, bits: jax.Array, scale: jax.Array | None = None, *, n: int, m: int, size: int
) -> jax.Array:
    """float32 (..., size, F) from the kept elements of a weight that has a bit for each position.

    Args:
      values: floating or int8 (..., C, F), or uint32 (..., C/8, F) int4 words; kept element c is the (c % n)-th that is
        set of the m positions from c // n * m on.
      bits: uint32 (..., size/32, F): bit i of word j says whether position 32*j + i is kept. Set n times in each m.
      scale: (..., size/g, F) for integers, else None.
      n, m: kept elements, positions a block; m is a multiple of 32.
      size: the dense length D of the contraction.

    Raises:
      ValueError: shapes do not fit together.
    """
    kept = (decode_words(values, 4) if values.dtype == jnp.uint32 else values).astype(jnp.float32)
    *lead, count, columns = kept.shape
    if m % 32 or size % m or count * m != size * n or bits.shape[-2] * 32 != size or bits.shape[-1] != columns:
        raise ValueError(f"{count} kept elements and bits {bits.shape} do not make {n}:{m} of {size}")
    words = bits.reshape(*lead, size // m, m // 32, 1, columns)
    place = jnp.arange(32, dtype=jnp.uint32)[:, None]
    # How many are set before each position: in its word, and in the words before that.
    inside = jax.lax.population_count(words & ((jnp.uint32(1) << place) - 1)).astype(jnp.int32)
    whole = jax.lax.population_count(words).astype(jnp.int32)
    rank = (inside + jnp.cumsum(whole, axis=-3) - whole).reshape(*lead, size // m, m, columns)
    rows = jnp.take_along_axis(kept.reshape(*lead, size // m, n, columns), jnp.minimum(rank, n - 1), axis=-2)
    dense = jnp.where(unpack_bits(bits), rows.reshape(*lead, size, columns), 0.0)
    return dense if scale is None else scale_groups(dense, scale)


def unpack_bits(choices: jax.Array) -> jax.Array:
    """bool (..., D, B) from words (..., D/32, B): bit i of word j stands for position 32*j + i."""
    *lead, words, blocks = choices.shape
    bits = choices[..., :, None, :] >> jnp.arange(32, dtype=jnp.uint32)[:, None] & 1
    return bits.reshape(*lead, 32 * words, blocks) != 0


def rank_chosen(groups: jax.Array) -> jax.Array:
    """int32 (..., m, B): how many of the group's positions that are set in bool (..., m, B) stand before each set one.

    Of a position that is not set, a number from 0 to 3 that means nothing.
    """
    return jnp.clip(jnp.cumsum(groups, axis=-2, dtype=jnp.int32) - 1, 0, 3)


def _spread(compact: jax.Array, choices: jax.Array, m: int, size: int) -> jax.Array:
    """(..., size, F) with the rows of `compact` (..., size*4/m, F) where the choices of a column's block are set."""
    *lead, _, columns = compact.shape
    if choices.shape[-2] * 32 != size or columns % choices.shape[-1]:
        raise ValueError(f"choices {choices.shape} do not fit a weight of {size} positions and {columns} columns")
    chosen = jnp.repeat(unpack_bits(choices), columns // choices.shape[-1], axis=-1)
    groups = chosen.reshape(*lead, size // m, m, columns)
    rows = jnp.take_along_axis(compact.reshape(*lead, size // m, 4, columns), rank_chosen(groups), axis=-2)
    return jnp.where(groups, rows, 0.0).reshape(*lead, size, columns)


def sparse_matmul_reference(
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
    """(..., F) = x (..., D) @ rebuilt weight; arguments as in api.py, already validated.

    The weight is rounded to x's dtype, as a dense model's would be; products are summed in float32.
    """
    if activation_bits is not None:
        reference = functools.partial(sparse_matmul_reference, n=n, m=m)
        return differentiate_as(reference, functools.partial(_multiply_rounded, n, m))(
            x, values, indices, scale, choices
        )
    weight = densify_nm(values, indices, scale, n, m, x.shape[-1], choices).astype(x.dtype)
    return jnp.matmul(x, weight, preferred_element_type=jnp.float32).astype(x.dtype)


def _multiply_rounded(
    n: int,
    m: int,
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    scale: jax.Array,
    choices: jax.Array | None = None,
) -> jax.Array:
    codes = densify_nm(values, indices, None, n, m, x.shape[-1], choices)
    return multiply_codes(x, codes.astype(jnp.int8), scale)
