"""Int4Offset: 4-bit codes that count from a minimum, with a float16 scale and a float16 minimum a group.

Invariant: w[d, f] = code[d, f] * scale[d // group, f] + minimum[d // group, f], codes in [0, 15], laid out by
`hsai_kernels.packing.pack_words`; 4 + 32 / group bits a weight.

Where a group's weights lie to one side of zero, or unevenly about it, all 16 levels are where they are; Int4 spends as
many below zero as above. Of normal weights, with searched scales, groups of 64 miss 0.084 of the norm, and those of
Int4 at the same 4.5 bits, groups of 32, 0.087. Groups of 32 are the blocks of GGUF's Q4_1 (ggml-common.h,
`block_q4_1`), numbers and all: scale and minimum are float16 as they are there, and weights that come from such a file
are held without error, but for blocks that do not use both the lowest and the highest code.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from hsai.errors import InputError
from hsai.formats.codes import Group
from hsai.formats.packed import Packed, check_divides, check_finite, invert_scale
from hsai_kernels import dequantize_words, pack_words

HIGHEST = 15
"""The largest code."""

HIGHEST_FLOAT16 = 65504.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4Offset(Packed):
    """words uint32 (..., D / 8, F); scale and minimum float16 (..., D / group, F)."""

    words: jax.Array
    scale: jax.Array
    minimum: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, words, outputs = self.words.shape
        return (*stack, words * 8, outputs)

    def dense(self) -> jax.Array:
        return dequantize_words(self.words, self.scale, 4, minimum=self.minimum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4OffsetConfig:
    """Rounds to 4 bits with one scale and one minimum for each group of weights along the contraction."""

    format: Literal["int4_offset"] = "int4_offset"
    """Names this format in files."""

    group: Group = 32
    """Weights along the contraction that share a scale and a minimum."""

    def pack(self, w: jax.Array, scale: jax.Array | None = None) -> Int4Offset:
        """Rounds w (..., D, F) to the nearest code.

        `scale` (..., D / group, 2 F) has the scales of all outputs, and behind them their minima; by default those that
        reach from the smallest to the largest weight of the group.
        Raises `InputError` for a contraction that the groups do not divide, and numbers that `check_finite` refuses,
        among them scales and minima beyond 65504, the largest float16.
        """
        check_divides(f"{self.format} with groups of {self.group}", self.group, w.shape[-2], w.shape)
        check_finite("the weight", w)
        w = w.astype(jnp.float32)
        given = span_groups(w, self.group) if scale is None else scale
        step, minimum = jnp.split(given.astype(jnp.float16), 2, axis=-1)
        largest = jnp.abs(given).max()
        if not isinstance(largest, jax.core.Tracer) and HIGHEST_FLOAT16 < largest < jnp.inf:
            raise InputError(
                f"{self.format} stores scales and minima as float16, at most {HIGHEST_FLOAT16:g}, and this weight "
                f"needs {float(largest):g}"
            )
        check_finite("the scale", step, negative=False)
        check_finite("the minimum", minimum)
        return Int4Offset(pack_words(round_from_minimum(w, step, minimum), 4), step, minimum)

    def invariant_bits(self, contraction: int) -> float:
        """Stored bits for each logical weight of a (contraction, F) matrix."""
        return 4.0 + 32.0 / self.group


def span_groups(w: jax.Array, group: int) -> jax.Array:
    """Scales and minima with which the codes reach from each group's smallest weight to its largest: (..., D, F)
    float32 -> (..., D / group, 2 F)."""
    *stack, size, outputs = w.shape
    groups = w.reshape(*stack, size // group, group, outputs)
    smallest, largest = jnp.min(groups, axis=-2), jnp.max(groups, axis=-2)
    return jnp.concatenate([(largest - smallest) / HIGHEST, smallest], axis=-1)


def round_from_minimum(w: jax.Array, scale: jax.Array, minimum: jax.Array) -> jax.Array:
    """The nearest code of each weight: (..., D, F) float32 -> uint8 in [0, 15].

    scale and minimum (..., D / group, F) are as they are stored, so that the codes make up for their rounding.
    """
    group = w.shape[-2] // scale.shape[-2]
    inverse = jnp.repeat(invert_scale(scale), group, axis=-2)
    start = jnp.repeat(minimum.astype(jnp.float32), group, axis=-2)
    return jnp.clip(jnp.round((w - start) * inverse), 0, HIGHEST).astype(jnp.uint8)
