"""Unstructured, UnstructuredInt8 and UnstructuredInt4: a share of the weights is kept, anywhere, and a bit for each
position says which.

Invariant: of every m consecutive positions along the contraction each output keeps n = density * m; bit i of word j of
`bits` is set where position 32 * j + i is kept, and kept element c of an output is the (c % n)-th that is set of the
positions from (c // n) * m on. (n / m) * b + 1 bits a weight with b-bit values: at a half, 9 in bfloat16, and 3.25 in
int4 with groups of 64, which is what 2:4 has; 4:8 has half a bit more.

So many of every m, and not as many as it may be of all, so that arrays are rectangles whatever the weights are, and
devices can be given parts of them. The price is small: of 64 positions 32 can be chosen in 2^60.7 ways of 2^64 (2:4: of
64, 2^41.4). No kernel multiplies by it: products rebuild the dense weight, on every platform. It saves bytes, and no
time.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from hsai.errors import InputError
from hsai.formats.nm import nm_mask, select_kept
from hsai.formats.sparse import ByteValues, CodeValues, FloatValues, Sparse, SparseConfig
from hsai_kernels import densify_bits, unpack_bits

WORD = 32
"""Positions in a word of bits."""


class _Masked(Sparse):
    """What the formats have in common: `bits` words (..., D / 32, F) beside values of C = D * n / m elements."""

    bits: jax.Array

    def dense(self) -> jax.Array:
        return densify_bits(**self.operands, n=self.n, m=self.m, size=self.shape[-2])

    def kept(self) -> jax.Array:
        return unpack_bits(self.bits)

    @property
    def unit(self) -> int:
        return self.m


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unstructured(_Masked):
    """values (..., C, F) bfloat16 or float32; bits uint32 (..., D / 32, F)."""

    values: jax.Array
    bits: jax.Array
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnstructuredInt8(_Masked):
    """values int8 (..., C, F); bits uint32 (..., D / 32, F); scale float32 (..., 1, F)."""

    values: jax.Array
    bits: jax.Array
    scale: jax.Array
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnstructuredInt4(_Masked):
    """words uint32 (..., C / 8, F); bits uint32 (..., D / 32, F); scale bfloat16 (..., D / group, F)."""

    signed_scale = True

    words: jax.Array
    bits: jax.Array
    scale: jax.Array
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnstructuredPattern(SparseConfig):
    """Keeps a share of the weights along the contraction, anywhere."""

    density: float = 0.5
    """The share that is kept of every block."""

    block: Literal[32, 64, 128, 256] = 64
    """Positions along the contraction that keep that share together; the more, the freer is the choice."""

    multiple: ClassVar[int] = 1
    """What is kept of a block is a multiple of this."""

    def __post_init__(self) -> None:
        kept = self.density * self.block
        if not 0 < kept < self.block or kept % self.multiple:
            raise InputError(
                f"density={self.density:g} of blocks of {self.block} keeps {kept:g} of each; valid are multiples of "
                f"{self.multiple / self.block:g} above 0 and below 1"
            )

    @property
    def counts(self) -> tuple[int, int]:
        return int(self.density * self.block), self.block

    @property
    def tile(self) -> int:
        return self.block

    @property
    def position_bits(self) -> float:
        return 1.0

    @property
    def pattern_name(self) -> str:
        n, m = self.counts
        return f"unstructured {n}:{m}"

    def mask(self, w: jax.Array) -> jax.Array:
        return nm_mask(w, *self.counts)

    def select(self, w: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        values, _ = select_kept(w, mask, *self.counts)
        *stack, size, outputs = mask.shape
        each = mask.reshape(*stack, size // WORD, WORD, outputs).astype(jnp.uint32)
        bits = jnp.sum(each << jnp.arange(WORD, dtype=jnp.uint32)[:, None], axis=-2, dtype=jnp.uint32)
        return {"values": values, "bits": bits}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnstructuredConfig(FloatValues, UnstructuredPattern):
    """Keeps a share of the weights, anywhere; saves bytes, and no time."""

    format: Literal["unstructured"] = "unstructured"
    packed = Unstructured


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnstructuredInt8Config(ByteValues, UnstructuredPattern):
    """Keeps a share of the weights, anywhere, rounded to 8 bits with a scale an output; saves bytes, and no time."""

    format: Literal["unstructured_int8"] = "unstructured_int8"
    packed = UnstructuredInt8


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnstructuredInt4Config(CodeValues, UnstructuredPattern):
    """Keeps a share of the weights, anywhere, rounded to 4 bits with a scale a group; saves bytes, and no time."""

    format: Literal["unstructured_int4"] = "unstructured_int4"
    packed = UnstructuredInt4
    multiple = 8
