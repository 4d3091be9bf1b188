"""Outliers: a few positions of the contraction stay in bfloat16, and everything else is in another format.

Invariant: w = base, plus `rows` at the positions that `index` names. Where the base has a level at zero, its rows there
are zero, and `rows` are the weights themselves. A product is x @ base + x[index] @ rows. With k positions of D:
the base's bits, 16 k / D bits a weight, and 32 k for all outputs together.

Few input channels carry most of what rounding costs: their activations are many times those of the others. Kept apart,
they are exact, and the scales of the rest need not reach them. Whole positions, and not single weights as in the
source, so that what is kept apart is a small dense product, on every platform.
Source: Dettmers et al., "SpQR" (2306.03078), there of single weights; of whole channels, "LLM.int8()" (2208.07339).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from hsai.errors import InputError
from hsai.formats.codes import Int2Config, Int3Config, Int4Config
from hsai.formats.int4_offset import Int4OffsetConfig
from hsai.formats.int8 import Int8Config
from hsai.formats.nm import NMConfig, NMInt4Config, NMInt8Config
from hsai.formats.packed import Packed
from hsai.formats.ternary import TernaryConfig
from hsai.formats.unstructured import UnstructuredConfig, UnstructuredInt4Config, UnstructuredInt8Config
from hsai.formats.vnm import VNMConfig, VNMInt4Config, VNMInt8Config

PlainConfig = (
    Int8Config
    | Int4Config
    | Int4OffsetConfig
    | Int3Config
    | Int2Config
    | TernaryConfig
    | NMConfig
    | NMInt8Config
    | NMInt4Config
    | VNMConfig
    | VNMInt8Config
    | VNMInt4Config
    | UnstructuredConfig
    | UnstructuredInt8Config
    | UnstructuredInt4Config
)
"""What holds the rest."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outliers(Packed):
    """base (..., D, F); rows bfloat16 (..., k, F); index int32 (..., k, 1), ascending."""

    base: Packed
    rows: jax.Array
    index: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def dense(self) -> jax.Array:
        where = select_positions(self.index, self.shape[-2])
        # A product with one-hot rows: exact, and the same on every platform and mesh.
        rows = jnp.matmul(where.astype(jnp.float32), self.rows.astype(jnp.float32), precision="highest")
        return self.base.dense() + rows

    def kept(self) -> jax.Array | None:
        return self.base.kept()

    def take(self, ids: jax.Array) -> Packed:
        return Outliers(self.base.take(ids), jnp.take(self.rows, ids, axis=-1, mode="clip"), self.index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutliersConfig:
    """Keeps some positions of the contraction in bfloat16, and the rest in another format."""

    format: Literal["outliers"] = "outliers"
    """Names this format in files."""

    base: PlainConfig = Int4Config()
    """What holds the rest."""

    share: float = 0.01
    """Of the positions of the contraction, how many are kept apart: at least one."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise InputError(f"outliers share={self.share:g} must be above 0 and at most 0.5")

    def count(self, contraction: int) -> int:
        """k."""
        return max(1, round(self.share * contraction))

    def find(self, cost: jax.Array) -> jax.Array:
        """The positions that cost most, of equals the earlier: (..., D) -> int32 (..., k), ascending."""
        return jnp.sort(jax.lax.top_k(cost, self.count(cost.shape[-1]))[1], axis=-1)

    def find_largest(self, w: jax.Array) -> jax.Array:
        """The positions of w (..., D, F) that hold the largest weights, by the sum of their squares; as `find`."""
        return self.find(jnp.sum(jnp.square(w.astype(jnp.float32)), axis=-1))

    def rest(self, w: jax.Array, index: jax.Array) -> jax.Array:
        """w (..., D, F) with zeros at the positions that are kept apart, float32."""
        apart = jnp.any(select_positions(index[..., None], w.shape[-2]), axis=-1)
        return jnp.where(apart[..., None], 0.0, w.astype(jnp.float32))

    def join(self, w: jax.Array, index: jax.Array, base: Packed) -> Outliers:
        """The weight w (..., D, F), whose `rest` is packed in `base`."""
        taken = jnp.take_along_axis(w.astype(jnp.float32), index[..., None], axis=-2)
        under = jnp.take_along_axis(base.dense(), index[..., None], axis=-2)
        return Outliers(base, (taken - under).astype(jnp.bfloat16), index[..., None].astype(jnp.int32))

    def pack(self, w: jax.Array, index: jax.Array | None = None) -> Outliers:
        """Packs w (..., D, F), keeping `index` (..., k) apart, by default the largest; raises as the base's `pack`."""
        index = self.find_largest(w) if index is None else index
        return self.join(w, index, self.base.pack(self.rest(w, index)))

    def invariant_bits(self, contraction: int) -> float:
        """Stored bits for each logical weight of a (contraction, F) matrix, without `index_bits`."""
        return self.base.invariant_bits(contraction) + 16.0 * self.count(contraction) / contraction

    def index_bits(self, contraction: int) -> int:
        """Stored bits for each matrix, however many outputs it has."""
        return 32 * self.count(contraction)


def select_positions(index: jax.Array, size: int) -> jax.Array:
    """bool (..., D, k): which of `size` positions each of index (..., k, 1) is."""
    return jnp.arange(size)[:, None] == jnp.swapaxes(index, -1, -2)
