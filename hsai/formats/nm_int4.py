"""NMInt4: N:M sparsity whose kept values are 4-bit codes with a bfloat16 scale a group.

Invariant: positions as in `hsai.formats.nm`, codes as in `hsai.formats.int4`; a scale group spans `group` *dense*
positions, so that both formats of one weight have the same scales. (n / m) * (4 + 2) + 16 / group bits a weight for
m = 4, and (n / m) * (4 + 3) + 16 / group for m = 8: with groups of 64, 2:4 has 3.25 bits, 4:8 3.75 and 2:8 2.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from hsai.formats.int4 import Group, group_absmax, round_to_codes
from hsai.formats.nm import check_pattern, index_block, nm_mask, select_kept
from hsai.formats.packed import Packed, check_divides, check_finite
from hsai_kernels import POSITION_BITS, densify_nm, pack_words


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NMInt4(Packed):
    """words uint32 (..., C / 8, F); indices uint32 (..., C * b / 32, F) of b = 2 bits (m = 4) or 3 (m = 8);
    scale bfloat16 (..., D / group, F)."""

    words: jax.Array
    indices: jax.Array
    scale: jax.Array
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, words, outputs = self.words.shape
        return (*stack, words * 8 * self.m // self.n, outputs)

    def dense(self) -> jax.Array:
        return densify_nm(self.words, self.indices, self.scale, self.n, self.m, self.shape[-2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class NMInt4Config:
    """Keeps n of every m weights along the contraction, rounded to 4 bits with a scale a group."""

    format: Literal["nm_int4"] = "nm_int4"
    """Names this format in files."""

    n: int = 2
    """Weights kept in each group of m."""

    m: int = 4
    """Size of a sparsity group along the contraction: 4 or 8."""

    group: Group = 64
    """Dense positions along the contraction that share a scale."""

    def __post_init__(self) -> None:
        check_pattern(self.n, self.m)

    def mask(self, w: jax.Array) -> jax.Array:
        """True where w (..., D, F) is kept by magnitude, bool (..., D, F)."""
        return nm_mask(w, self.n, self.m)

    def pack(self, w: jax.Array, mask: jax.Array | None = None, scale: jax.Array | None = None) -> NMInt4:
        """Packs w (..., D, F); `mask` chooses what is kept (default: the largest), `scale` (..., D / group, F) the
        step of each group (default: max|kept| / 7)."""
        block = max(self.group, index_block(self.n, self.m))
        check_divides(f"{self.n}:{self.m} int4 with groups of {self.group}", block, w.shape[-2], w.shape)
        check_finite("the weight", w)
        w = w.astype(jnp.float32)
        mask = self.mask(w) if mask is None else mask
        kept = jnp.where(mask, w, 0.0)
        scale = (group_absmax(kept, self.group) / 7.0 if scale is None else scale).astype(jnp.bfloat16)
        check_finite("the scale", scale, is_scale=True)
        codes, indices = select_kept(round_to_codes(kept, scale), mask, self.n, self.m)
        return NMInt4(pack_words(codes, 4), pack_words(indices, POSITION_BITS[self.m]), scale, self.n, self.m)

    def invariant_bits(self, contraction: int) -> float:
        """Stored bits for each logical weight of a (contraction, F) matrix."""
        return self.n / self.m * (4.0 + POSITION_BITS[self.m]) + 16.0 / self.group
