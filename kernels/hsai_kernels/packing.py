"""How 2-bit, 3-bit and 4-bit integers share 32-bit words: the one layout that every packed format and kernel uses.

A word holds E = 32 // bits elements of *one column*, consecutive along the contraction (axis -2); element e sits at bit
`8 * (e % 4) + bits * (e // 4)`. So byte j, slot s of a word holds element 4*s + j, which serves every backend: on a
little-endian CPU one shift and one mask leave 4 consecutive elements as 4 bytes, ready for a byte multiply-add; on a
TPU or GPU columns stay in 32-bit lanes, and no element straddles a lane.

3 bits do not divide a word: 32 elements take three. They are those of four 4-bit words a, b, c, d, whose every fourth
bit is free, folded together: the low 2 bits of a and b share the first word, those of c and d the second, and the third
has the high bits of all four. A shift, a mask and an or of two of the three give each of a, b, c and d back.

Dimensions: C elements along the contraction, E elements a word, F columns.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hsai_kernels.options import is_int_of

BLOCKS = {2: 16, 3: 32, 4: 8}
"""Widths that can be packed, and how many elements of each fill whole words."""

LOW, TOP = np.uint32(0x33333333), np.uint32(0x44444444)
"""Of every 4-bit slot of a word, the low 2 bits and the one above them."""


def count_elements(bits: int) -> int:
    """How many elements of `bits` bits fill whole words: one word, or three of 3 bits.

    Raises ValueError for a width that is not supported.
    """
    if not is_int_of(bits, BLOCKS):
        raise ValueError(f"bits={bits!r} cannot be packed: valid are {', '.join(map(str, BLOCKS))}")
    return BLOCKS[bits]


def find_shift(element: Any, bits: int) -> Any:
    """Bit offset of element 0 to E - 1 of a word, for 2 or 4 bits: of an integer, or of an array of them."""
    return 8 * (element & 3) + bits * (element >> 2)


def find_halves(element: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Where element 0 to 31 of three words of 3 bits stands: word and bit of its low 2 bits, and of its high bit.

    Of an integer, or of an array of them.
    """
    slot = 8 * (element & 3) + (element & 4)
    return (element >> 4, slot + ((element >> 2) & 2)), (2, slot + (element >> 3))


def _list_shifts(bits: int) -> np.ndarray:
    """Bit offset of every element of a word, shape (E, 1) uint32: broadcasts against (..., E, F)."""
    return find_shift(np.arange(32 // bits, dtype=np.uint32), bits)[:, None].astype(np.uint32)


def pack_words(x: jax.Array | np.ndarray, bits: int) -> jax.Array:
    """Packs unsigned integers (..., C, F), each below 2**bits, into uint32 words (..., C * bits / 32, F).

    Values that do not fit are the caller's defect: they would spill into their neighbours.
    Raises ValueError if C elements do not fill whole words, or x is not of an unsigned integer type.
    """
    block = count_elements(bits)
    if not jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        raise ValueError(f"pack_words needs unsigned integers, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"pack_words needs an array (..., C, F), got shape {x.shape}")
    *lead, contraction, columns = x.shape
    if contraction % block:
        raise ValueError(f"{contraction} elements do not fill words of {block} ({bits} bits each)")
    if bits == 3:
        return _fold(pack_words(x, 4))
    split = jnp.asarray(x).astype(jnp.uint32).reshape(*lead, contraction // block, block, columns)
    # The shifted elements share no bit, so that their sum is their union.
    return jnp.sum(split << _list_shifts(bits), axis=-2, dtype=jnp.uint32)


def unpack_words(words: jax.Array | np.ndarray, bits: int) -> jax.Array:
    """Unpacks uint32 words (..., W, F) into uint8 (..., W * 32 / bits, F): the exact inverse of `pack_words`.

    Raises ValueError if `words` is not uint32, or if words of 3 bits are no multiple of three.
    """
    block = count_elements(bits)
    if words.dtype != jnp.uint32:
        raise ValueError(f"unpack_words needs uint32 words, got {words.dtype}")
    if words.ndim < 2:
        raise ValueError(f"unpack_words needs an array (..., W, F), got shape {words.shape}")
    *lead, rows, columns = words.shape
    if bits == 3:
        if rows % 3:
            raise ValueError(f"{rows} words are no multiple of the 3 that {block} elements of 3 bits take")
        return unpack_words(_unfold(jnp.asarray(words)), 4)
    mask = np.uint32(2**bits - 1)
    split = (jnp.asarray(words)[..., :, None, :] >> _list_shifts(bits)) & mask
    return split.astype(jnp.uint8).reshape(*lead, rows * block, columns)


def _fold(words: jax.Array) -> jax.Array:
    """Words of 3 bits (..., 3 W, F) from those of 4 bits (..., 4 W, F) whose every fourth bit is 0."""
    *lead, rows, columns = words.shape
    a, b, c, d = jnp.moveaxis(words.reshape(*lead, rows // 4, 4, columns), -2, 0)
    high = ((a & TOP) >> 2) | ((b & TOP) >> 1) | (c & TOP) | ((d & TOP) << 1)
    folded = [(a & LOW) | ((b & LOW) << 2), (c & LOW) | ((d & LOW) << 2), high]
    return jnp.stack(folded, axis=-2).reshape(*lead, rows // 4 * 3, columns)


def _unfold(words: jax.Array) -> jax.Array:
    """The inverse of `_fold`: words of 4 bits (..., 4 W, F) from (..., 3 W, F)."""
    *lead, rows, columns = words.shape
    first, second, high = jnp.moveaxis(words.reshape(*lead, rows // 3, 3, columns), -2, 0)
    return jnp.stack(unfold_triple(first, second, high), axis=-2).reshape(*lead, rows // 3 * 4, columns)


def unfold_triple(first: jax.Array, second: jax.Array, high: jax.Array) -> list[jax.Array]:
    """The four words of 4 bits, uint32, that three words of 3 bits hold: 8 consecutive elements each."""
    lows = [first & LOW, (first >> 2) & LOW, second & LOW, (second >> 2) & LOW]
    highs = [(high << 2) & TOP, (high << 1) & TOP, high & TOP, (high >> 1) & TOP]
    return [low | top for low, top in zip(lows, highs, strict=True)]
