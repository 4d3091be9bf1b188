"""Int4: four bits a weight, eight of one output in a 32-bit word, one bfloat16 scale a group along the contraction.

Invariant: w[d, f] = (code[d, f] - 8) * scale[d // group, f], codes in [0, 15], laid out by
`hsai_kernels.packing.pack_words`; 4 + 16 / group bits a weight.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from hsai.formats.packed import Packed, check_divides, check_finite, invert_scale
from hsai_kernels import dequantize_int4, pack_words

Group = Literal[32, 64, 128]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4(Packed):
    """words uint32 (..., D / 8, F); scale bfloat16 (..., D / group, F)."""

    words: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, words, outputs = self.words.shape
        return (*stack, words * 8, outputs)

    def dense(self) -> jax.Array:
        return dequantize_int4(self.words, self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4Config:
    """Rounds to 4 bits with one scale for each group of weights along the contraction."""

    format: Literal["int4"] = "int4"
    """Names this format in files."""

    group: Group = 64
    """Weights along the contraction that share a scale."""

    def pack(self, w: jax.Array, scale: jax.Array | None = None) -> Int4:
        """Rounds w (..., D, F) to the nearest code; `scale` (..., D / group, F), by default max|w| / 7 of the group.

        Raises `InputError` for a contraction that the groups do not divide, and numbers that `check_finite` refuses.
        """
        check_divides(f"int4 with groups of {self.group}", self.group, w.shape[-2], w.shape)
        check_finite("the weight", w)
        w = w.astype(jnp.float32)
        scale = (group_absmax(w, self.group) / 7.0 if scale is None else scale).astype(jnp.bfloat16)
        check_finite("the scale", scale, is_scale=True)
        return Int4(pack_words(round_to_codes(w, scale), 4), scale)

    def invariant_bits(self, contraction: int) -> float:
        """Stored bits for each logical weight of a (contraction, F) matrix."""
        return 4.0 + 16.0 / self.group


def group_absmax(w: jax.Array, group: int) -> jax.Array:
    """max|w| over each group along the contraction: (..., D, F) -> (..., D / group, F)."""
    *stack, size, outputs = w.shape
    return jnp.max(jnp.abs(w.reshape(*stack, size // group, group, outputs)), axis=-2)


def round_to_codes(w: jax.Array, scale: jax.Array) -> jax.Array:
    """The nearest 4-bit code of each weight: (..., D, F) float32 -> uint8 in [0, 15]; 8 stands for zero.

    `scale` is (..., D / group, F), already rounded to the precision that is stored, so that the codes make up for it.
    """
    inverse = jnp.repeat(invert_scale(scale), w.shape[-2] // scale.shape[-2], axis=-2)
    codes = jnp.round(w * inverse) + 8.0
    return jnp.clip(codes, 0, 15).astype(jnp.uint8)
