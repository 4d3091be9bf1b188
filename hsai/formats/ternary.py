"""Ternary: every weight is -1, 0 or 1 times the scale of its group, in 2-bit codes.

Invariant: w[d, f] = (code[d, f] - 2) * scale[d // group, f], codes 1, 2 and 3 (0 would be -2, which no weight takes),
laid out by `hsai_kernels.packing.pack_words`; 2 + 16 / group bits a weight. Three values would fit in 1.6 bits, five in
a byte; codes of 2 bits cost a quarter more, and one shift and one mask decode them.
Source: Ma et al., "The Era of 1-bit LLMs" (BitNet b1.58, 2402.17764), eqs. 1 to 3, there with one scale a matrix.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from hsai.formats.packed import Packed, check_divides, check_finite, invert_scale
from hsai_kernels import count_elements, dequantize_words, pack_words


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ternary(Packed):
    """words uint32 (..., D / 16, F); scale bfloat16 (..., D / group, F), or (..., 1, F) for one an output."""

    words: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, words, outputs = self.words.shape
        return (*stack, words * count_elements(2), outputs)

    def dense(self) -> jax.Array:
        return dequantize_words(self.words, self.scale, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TernaryConfig:
    """Rounds to -1, 0 or 1 times the mean magnitude of a group."""

    format: Literal["ternary"] = "ternary"
    """Names this format in files."""

    group: Literal[32, 64, 128] | None = 64
    """Weights along the contraction that share a scale; None for all of an output."""

    def pack(self, w: jax.Array, scale: jax.Array | None = None) -> Ternary:
        """Rounds w (..., D, F) to the nearest of the three; `scale` (..., D / group, F), by default mean|w| (eq. 3)."""
        *stack, size, outputs = w.shape
        block = self.group or count_elements(2)
        what = "ternary with a scale an output" if self.group is None else f"ternary with groups of {self.group}"
        check_divides(what, block, size, w.shape)
        check_finite("the weight", w)
        groups = w.astype(jnp.float32).reshape(*stack, -1, self.group or size, outputs)
        scale = (self.absmean_scale(w) if scale is None else scale).astype(jnp.bfloat16)
        check_finite("the scale", scale, negative=False)
        # For the scale as it is stored; one of zero has an inverse of zero.
        codes = jnp.clip(jnp.round(groups * invert_scale(scale)[..., None, :]), -1, 1) + 2.0
        return Ternary(pack_words(codes.reshape(w.shape).astype(jnp.uint8), 2), scale)

    def absmean_scale(self, w: jax.Array) -> jax.Array:
        """The mean magnitude of each group (eq. 3), float32 (..., D / group, F)."""
        *stack, size, outputs = w.shape
        groups = jnp.abs(w.astype(jnp.float32)).reshape(*stack, -1, self.group or size, outputs)
        return jnp.mean(groups, axis=-2)

    def invariant_bits(self, contraction: int) -> float:
        """Stored bits for each logical weight of a (contraction, F) matrix."""
        return 2.0 + 16.0 / (self.group or contraction)
