"""What the Triton kernels have in common: sizes of blocks, loads that are masked, products that are exact.

Triton's blocks are powers of two, at least 16 on every side of a product; its loads and stores check no bounds. So each
kernel masks what lies outside of its arrays, and takes no mask where, statically, nothing can.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from hsai_kernels.packing import count_elements, find_halves, find_shift

SMALLEST_BLOCK = 16
"""What a side of a Triton product must have."""


def fit_block(size: int, needed: int) -> int:
    """`size`, or the next power of two that holds all of `needed`."""
    return min(size, max(SMALLEST_BLOCK, pl.next_power_of_2(needed)))


def check_block(name: str, size: int) -> None:
    """Raises ValueError unless a product can have a side of `size`."""
    if size < SMALLEST_BLOCK or size & (size - 1):
        raise ValueError(f"{name}={size} is no block of Triton: valid are powers of two from {SMALLEST_BLOCK}")


def index_matrix(rows: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column of each element (r, c), from rows (r,) and columns (c,): as refs want them, of one shape."""
    shape = (rows.shape[0], columns.shape[0])
    return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None, :], shape)


def load_matrix(
    ref: jax.Array, rows: jax.Array, columns: jax.Array, real: jax.Array | None, *, lead: tuple[int, ...] = ()
) -> jax.Array:
    """(r, c) of a matrix, at `lead` of a stack of them; zeros where `real` (r, c) is False. None: all are there."""
    at = ref.at[(*lead, *index_matrix(rows, columns))]
    return plgpu.load(at) if real is None else plgpu.load(at, mask=real, other=0)


def load_elements(
    ref: jax.Array, bits: int, element: jax.Array, columns: jax.Array, real: jax.Array | None
) -> jax.Array:
    """int32 (k, c): packed elements (k,) of columns (c,), of 2, 3 or 4 bits; zeros where `real` (k, c) is False.

    Neighbouring elements share words: they are loaded again for each, from the first cache and not from memory.
    """
    a_word = count_elements(bits)
    word, place = jax.lax.div(element, jnp.int32(a_word)), jax.lax.rem(element, jnp.int32(a_word))
    if bits != 3:
        return _load_bits(ref, bits, word, find_shift(place, bits), columns, real).astype(jnp.int32)
    (low, low_shift), (high, high_shift) = find_halves(place)
    lower = _load_bits(ref, 2, word * 3 + low, low_shift, columns, real)
    upper = _load_bits(ref, 1, word * 3 + high, high_shift, columns, real)
    return (lower | (upper << jnp.uint32(2))).astype(jnp.int32)


def _load_bits(
    ref: jax.Array, bits: int, word: jax.Array, shift: jax.Array, columns: jax.Array, real: jax.Array | None
) -> jax.Array:
    """uint32 (k, c): `bits` bits of the words (k,) of columns (c,), from bit `shift` (k,) on."""
    words = load_matrix(ref, word, columns, real)
    return (words >> shift.astype(jnp.uint32)[:, None]) & jnp.uint32(2**bits - 1)


def load_transposed(ref: jax.Array, rows: jax.Array, columns: jax.Array, real: jax.Array) -> jax.Array:
    """(r, c) of a matrix whose transpose `ref` holds, (columns, rows); zeros where `real` (r, c) is False."""
    row, column = index_matrix(rows, columns)
    return plgpu.load(ref.at[column, row], mask=real, other=0)
