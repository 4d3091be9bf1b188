"""How 2-bit and 4-bit integers share 32-bit words: the one layout that every packed format and kernel uses.

A word holds E = 32 // bits elements of *one column*, consecutive along the contraction (axis -2); element e sits at bit
`8 * (e % 4) + bits * (e // 4)`. So byte j, slot s of a word holds element 4*s + j, which serves every backend: on a
little-endian CPU one shift and one mask leave 4 consecutive elements as 4 bytes, ready for a byte multiply-add; on a
TPU or GPU columns stay in 32-bit lanes, and no element straddles a lane.

Dimensions: C elements along the contraction, E elements a word, F columns.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SUPPORTED_BITS = (2, 4)
"""Widths that can be packed."""


def count_elements(bits: int) -> int:
    """How many elements of `bits` bits one word holds. Raises ValueError for a width that is not supported."""
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"bits={bits} cannot be packed: valid are {', '.join(map(str, SUPPORTED_BITS))}")
    return 32 // bits


def find_shift(element: Any, bits: int) -> Any:
    """Bit offset of element 0 to E - 1 of a word: of an integer, or of an array of them."""
    return 8 * (element & 3) + bits * (element >> 2)


def _list_shifts(bits: int) -> np.ndarray:
    """Bit offset of every element of a word, shape (E, 1) uint32: broadcasts against (..., E, F)."""
    return find_shift(np.arange(32 // bits, dtype=np.uint32), bits)[:, None].astype(np.uint32)


def pack_words(x: jax.Array | np.ndarray, bits: int) -> jax.Array:
    """Packs unsigned integers (..., C, F), each below 2**bits, into uint32 words (..., C * bits / 32, F).

    Values that do not fit are the caller's defect: they would spill into their neighbours.
    Raises ValueError if C is no multiple of 32 // bits, or x is not of an unsigned integer type.
    """
    per_word = count_elements(bits)
    if not jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        raise ValueError(f"pack_words needs unsigned integers, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"pack_words needs an array (..., C, F), got shape {x.shape}")
    *lead, contraction, columns = x.shape
    if contraction % per_word:
        raise ValueError(f"{contraction} elements do not fill words of {per_word} ({bits} bits each)")
    split = jnp.asarray(x).astype(jnp.uint32).reshape(*lead, contraction // per_word, per_word, columns)
    # The shifted elements share no bit, so that their sum is their union.
    return jnp.sum(split << _list_shifts(bits), axis=-2, dtype=jnp.uint32)


def unpack_words(words: jax.Array | np.ndarray, bits: int) -> jax.Array:
    """Unpacks uint32 words (..., W, F) into uint8 (..., W * 32 / bits, F): the exact inverse of `pack_words`.

    Raises ValueError if `words` is not uint32.
    """
    per_word = count_elements(bits)
    if words.dtype != jnp.uint32:
        raise ValueError(f"unpack_words needs uint32 words, got {words.dtype}")
    if words.ndim < 2:
        raise ValueError(f"unpack_words needs an array (..., W, F), got shape {words.shape}")
    *lead, rows, columns = words.shape
    mask = np.uint32(2**bits - 1)
    split = (jnp.asarray(words)[..., :, None, :] >> _list_shifts(bits)) & mask
    return split.astype(jnp.uint8).reshape(*lead, rows * per_word, columns)
