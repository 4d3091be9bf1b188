"""Int2, Int3 and Int4: integer codes of few bits in words, and one bfloat16 scale a group along the contraction.

Invariant: w[d, f] = (code[d, f] - zero) * scale[d // group, f], codes in [0, 2^bits), laid out by
`hsai_kernels.packing.pack_words`; bits + 16 / group bits a weight.

Int4 has its zero at code 8: levels -8..7, and scales that may be negative, so that level -8 serves whichever sign has
the largest magnitude of a group, as in ggml's Q4_0. Int2 and Int3 are centered, their zero lies between the two codes
in the middle: levels -3/2, -1/2, 1/2, 3/2, and -7/2 to 7/2. With few levels, one more below zero than above is a level
that half of the weights cannot use, and one at zero is where weights cost least anyway. Of normal weights, rounded with
the best scale, the relative error is 0.345 with four centered levels, 0.387 with -2..1, and 0.436 with the three of
Ternary; 0.194 with eight centered ones, and 0.202 with -4..3; sixteen gain 1 %. (All with positive scales: with signed
ones -4..3 would be at 0.177 in groups of 64, where eight centered ones are at 0.182, and of Laplace weights at 0.221
and 0.243.) That no weight is zero but in a group of zeros costs nothing that this measure does not count. In integers
both are exact: a centered level is an odd multiple of half a scale.

Three bits are stored as three: 32 weights take three words, of which kernels unfold four of 4-bit slots.
Source: of the step that is best for normal weights, Max, "Quantizing for minimum distortion" (1960), table II.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from hsai.formats.packed import Packed, check_divides, check_finite, invert_scale
from hsai_kernels import dequantize_words, find_zero, pack_words

Group = Literal[32, 64, 128]


@dataclasses.dataclass(frozen=True)
class Codes(Packed):
    """words uint32 (..., D * bits / 32, F); scale bfloat16 (..., D / group, F)."""

    words: jax.Array
    scale: jax.Array

    bits: ClassVar[int]
    """Of a code."""

    centered: ClassVar[bool]
    """Whether zero lies between the codes."""

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, words, outputs = self.words.shape
        return (*stack, words * 32 // self.bits, outputs)

    def dense(self) -> jax.Array:
        return dequantize_words(self.words, self.scale, self.bits, centered=self.centered)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int2(Codes):
    """Levels -3/2 to 3/2; words uint32 (..., D / 16, F)."""

    bits = 2
    centered = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int3(Codes):
    """Levels -7/2 to 7/2; words uint32 (..., 3 * D / 32, F)."""

    bits = 3
    centered = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4(Codes):
    """Levels -8 to 7; words uint32 (..., D / 8, F)."""

    bits = 4
    centered = False
    signed_scale = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CodesConfig:
    """Rounds to codes with one scale for each group of weights along the contraction."""

    format: str
    """Names this format in files."""

    group: Group = 64
    """Weights along the contraction that share a scale."""

    packed: ClassVar[type[Codes]]
    """What `pack` makes."""

    def pack(self, w: jax.Array, scale: jax.Array | None = None) -> Codes:
        """Rounds w (..., D, F) to the nearest code; `scale` (..., D / group, F), by default the one under which max|w|
        of the group is the highest level.

        Raises `InputError` for a contraction that the groups do not divide, and numbers that `check_finite` refuses.
        """
        check_divides(f"{self.format} with groups of {self.group}", self.group, w.shape[-2], w.shape)
        check_finite("the weight", w)
        w = w.astype(jnp.float32)
        bits, centered = self.packed.bits, self.packed.centered
        if scale is None:
            scale = group_absmax(w, self.group) / (2**bits - 1 - find_zero(bits, centered))
        scale = scale.astype(jnp.bfloat16)
        check_finite("the scale", scale, negative=self.packed.signed_scale)
        return self.packed(pack_words(round_to_codes(w, scale, bits, centered=centered), bits), scale)

    def invariant_bits(self, contraction: int) -> float:
        """Stored bits for each logical weight of a (contraction, F) matrix."""
        return self.packed.bits + 16.0 / self.group


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int2Config(_CodesConfig):
    """Rounds to 2 bits with one scale for each group of weights along the contraction."""

    format: Literal["int2"] = "int2"
    packed = Int2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int3Config(_CodesConfig):
    """Rounds to 3 bits with one scale for each group of weights along the contraction."""

    format: Literal["int3"] = "int3"
    packed = Int3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4Config(_CodesConfig):
    """Rounds to 4 bits with one scale for each group of weights along the contraction."""

    format: Literal["int4"] = "int4"
    packed = Int4


def group_absmax(w: jax.Array, group: int) -> jax.Array:
    """max|w| over each group along the contraction: (..., D, F) -> (..., D / group, F)."""
    *stack, size, outputs = w.shape
    return jnp.max(jnp.abs(w.reshape(*stack, size // group, group, outputs)), axis=-2)


def round_to_codes(w: jax.Array, scale: jax.Array, bits: int, *, centered: bool = False) -> jax.Array:
    """The nearest code of each weight: (..., D, F) float32 -> uint8 in [0, 2^bits).

    `scale` is (..., D / group, F), already rounded to the precision that is stored, so that the codes make up for it.
    """
    inverse = jnp.repeat(invert_scale(scale), w.shape[-2] // scale.shape[-2], axis=-2)
    half = 2 ** (bits - 1)
    codes = jnp.round(w * inverse - (half - find_zero(bits, centered))) + half
    return jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8)
