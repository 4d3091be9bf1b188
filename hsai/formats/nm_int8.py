"""NMInt8: N:M sparsity whose kept values are signed bytes with a float32 scale an output.

Invariant: positions as in `hsai.formats.nm`, values and scale as in `hsai.formats.int8`; (n / m) * (8 + 2) + 32 / D
bits a weight for m = 4, (n / m) * (8 + 3) + 32 / D for m = 8: 2:4 has 5 bits where its bfloat16 form has 9, at hardly
any loss beyond that of pruning.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from hsai.formats.int8 import absmax_scale, round_to_bytes
from hsai.formats.nm import check_pattern, index_block, nm_mask, select_kept
from hsai.formats.packed import Packed, check_divides, check_finite
from hsai_kernels import POSITION_BITS, densify_nm, pack_words


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NMInt8(Packed):
    """values int8 (..., C, F); indices uint32 (..., C * b / 32, F) of b = 2 bits (m = 4) or 3 (m = 8);
    scale float32 (..., 1, F)."""

    values: jax.Array
    indices: jax.Array
    scale: jax.Array
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, kept, outputs = self.values.shape
        return (*stack, kept * self.m // self.n, outputs)

    def dense(self) -> jax.Array:
        return densify_nm(self.values, self.indices, self.scale, self.n, self.m, self.shape[-2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class NMInt8Config:
    """Keeps n of every m weights along the contraction, rounded to 8 bits with a scale an output."""

    format: Literal["nm_int8"] = "nm_int8"
    """Names this format in files."""

    n: int = 2
    """Weights kept in each group of m."""

    m: int = 4
    """Size of a sparsity group along the contraction: 4 or 8."""

    def __post_init__(self) -> None:
        check_pattern(self.n, self.m)

    def mask(self, w: jax.Array) -> jax.Array:
        """True where w (..., D, F) is kept by magnitude, bool (..., D, F)."""
        return nm_mask(w, self.n, self.m)

    def pack(self, w: jax.Array, mask: jax.Array | None = None, scale: jax.Array | None = None) -> NMInt8:
        """Packs w (..., D, F); `mask` chooses what is kept (default: the largest), `scale` (..., 1, F) float32 the step
        of each output (default: max|kept| / 127)."""
        check_divides(f"{self.n}:{self.m} int8", index_block(self.n, self.m), w.shape[-2], w.shape)
        check_finite("the weight", w)
        w = w.astype(jnp.float32)
        mask = self.mask(w) if mask is None else mask
        kept = jnp.where(mask, w, 0.0)
        scale = (absmax_scale(kept) if scale is None else scale).astype(jnp.float32)
        check_finite("the scale", scale, is_scale=True)
        values, indices = select_kept(round_to_bytes(kept, scale), mask, self.n, self.m)
        return NMInt8(values, pack_words(indices, POSITION_BITS[self.m]), scale, self.n, self.m)

    def invariant_bits(self, contraction: int) -> float:
        """Stored bits for each logical weight of a (contraction, F) matrix."""
        return self.n / self.m * (8.0 + POSITION_BITS[self.m]) + 32.0 / contraction
