"""VNM, VNMInt8 and VNMInt4: V neighbouring outputs keep the same 4 of every m weights along the contraction, each n of
those 4.

Invariant: with p the 4 positions of a block's group that are set in `choices`, ascending, kept element c of an output
stands at dense position (c // n) * m + p[index[c]]. With b-bit values: (n / m) * (b + 2) + 1 / V bits a weight, so 2:8
keeps a quarter of the weights for the indices of 2:4.
Source: VENOM, Castro et al., "A vectorized N:M format for unleashing the power of sparse tensor cores" (2310.02065).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from hsai.errors import InputError
from hsai.formats.codes import Group
from hsai.formats.nm import index_block, nm_mask, select_kept
from hsai.formats.packed import Packed
from hsai.formats.sparse import ByteValues, CodeValues, FloatValues, Sparse, SparseConfig
from hsai_kernels import pack_words, rank_chosen

CHOSEN = 4
"""Positions of every m that a block may keep."""

WORD = 32
"""Positions of the contraction in a word of choices."""

Width = Literal[8, 16, 32]


class _Blocked(Sparse):
    """What the formats have in common: `choices` words (..., D / 32, F / V) beside values of F columns."""

    choices: jax.Array

    def take(self, ids: jax.Array) -> Packed:
        block = self.shape[-1] // self.choices.shape[-1]
        columns = jax.tree.map(lambda leaf: jnp.take(leaf, ids, axis=-1, mode="clip"), self)
        # A column that stands alone is a block of one.
        return dataclasses.replace(columns, choices=jnp.take(self.choices, ids // block, axis=-1, mode="clip"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VNM(_Blocked):
    """values (..., C, F) bfloat16 or float32; indices uint32 (..., C / 16, F); choices uint32 (..., D / 32, F / V)."""

    values: jax.Array
    indices: jax.Array
    choices: jax.Array
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VNMInt8(_Blocked):
    """values int8 (..., C, F); indices and choices as in VNM; scale float32 (..., 1, F)."""

    values: jax.Array
    indices: jax.Array
    scale: jax.Array
    choices: jax.Array
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VNMInt4(_Blocked):
    """words uint32 (..., C / 8, F); indices and choices as in VNM; scale bfloat16 (..., D / group, F)."""

    signed_scale = True

    words: jax.Array
    indices: jax.Array
    scale: jax.Array
    choices: jax.Array
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class VNMPattern(SparseConfig):
    """Keeps n of every m weights along the contraction, out of 4 that `v` neighbouring outputs have in common."""

    v: int = 64
    """Outputs that share a choice; native products need a multiple of 16."""

    n: int = 2
    """Weights kept of each 4 that were chosen."""

    m: Width = 8
    """Positions along the contraction of which 4 are chosen."""

    def __post_init__(self) -> None:
        if self.v < 1 or not 1 <= self.n < CHOSEN or self.m not in (8, 16, 32):
            raise InputError(
                f"sparsity {self.pattern_name} is not supported; valid are 1 output a block or more, n from 1 to 3, "
                "m 8, 16 or 32"
            )

    @property
    def counts(self) -> tuple[int, int]:
        return self.n, self.m

    @property
    def tile(self) -> int:
        return max(WORD, index_block(self.n, CHOSEN) * self.m // CHOSEN)

    @property
    def position_bits(self) -> float:
        return self.n / self.m * 2.0 + 1.0 / self.v

    @property
    def pattern_name(self) -> str:
        return f"{self.v}:{self.n}:{self.m}"

    @property
    def width(self) -> int:
        return self.v

    def mask(self, w: jax.Array) -> jax.Array:
        return vnm_mask(w, self.v, self.n, self.m)

    def select(self, w: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        values, indices, choices = select_blocks(w, mask, self.v, self.n, self.m)
        return {"values": values, "indices": pack_words(indices, 2), "choices": choices}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VNMConfig(FloatValues, VNMPattern):
    """Keeps n of every m weights along the contraction, out of 4 that `v` neighbouring outputs have in common."""

    format: Literal["vnm"] = "vnm"
    packed = VNM


@dataclasses.dataclass(frozen=True, kw_only=True)
class VNMInt8Config(ByteValues, VNMPattern):
    """Keeps n of every m weights, out of 4 that `v` outputs have in common, in 8 bits with a scale an output."""

    format: Literal["vnm_int8"] = "vnm_int8"
    packed = VNMInt8


@dataclasses.dataclass(frozen=True, kw_only=True)
class VNMInt4Config(CodeValues, VNMPattern):
    """Keeps n of every m weights, out of 4 that `v` outputs have in common, in 4 bits with a scale a group."""

    format: Literal["vnm_int4"] = "vnm_int4"
    packed = VNMInt4

    group: Group = 128
    """Dense positions along the contraction that share a scale."""


def vnm_mask(w: jax.Array, v: int, n: int, m: int) -> jax.Array:
    """True where w (..., D, F) is kept by magnitude, bool (..., D, F).

    The 4 positions of a block are those whose magnitudes over its v outputs sum to the most (VENOM, section 5); of
    equal ones the earlier. Of the 4 each output keeps its n largest.
    """
    *stack, size, outputs = w.shape
    sums = jnp.sum(jnp.abs(w.astype(jnp.float32)).reshape(*stack, size, outputs // v, v), axis=-1)
    chosen = jnp.repeat(nm_mask(sums, CHOSEN, m), v, axis=-1)
    values, _ = select_kept(w, chosen, CHOSEN, m)
    kept = nm_mask(values, n, CHOSEN).reshape(*stack, size // m, CHOSEN, outputs)
    groups = chosen.reshape(*stack, size // m, m, outputs)
    return (groups & jnp.take_along_axis(kept, rank_chosen(groups), axis=-2)).reshape(w.shape)


def select_blocks(w: jax.Array, mask: jax.Array, v: int, n: int, m: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kept values (..., C, F), their positions among the chosen, uint8 (..., C, F), and the choices as words.

    A block chooses what any of its outputs keeps; where that is fewer than 4 of m, the earliest of the rest too. A mask
    of more is the caller's defect: what is kept beyond the fourth is lost.
    """
    *stack, size, outputs = w.shape
    used = jnp.any(mask.reshape(*stack, size, outputs // v, v), axis=-1)
    blocks = nm_mask(used.astype(jnp.float32), CHOSEN, m)
    chosen = jnp.repeat(blocks, v, axis=-1)
    compact, _ = select_kept(w, chosen, CHOSEN, m)
    compact_mask, _ = select_kept(mask, chosen, CHOSEN, m)
    values, indices = select_kept(compact, compact_mask, n, CHOSEN)
    bits = blocks.reshape(*stack, size // WORD, WORD, outputs // v).astype(jnp.uint32)
    choices = jnp.sum(bits << jnp.arange(WORD, dtype=jnp.uint32)[:, None], axis=-2, dtype=jnp.uint32)
    return values, indices, choices
