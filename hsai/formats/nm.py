"""NM, NMInt8 and NMInt4: of every m consecutive weights along the contraction n are kept, with their positions.

Invariant: kept element c of an output belongs to group c // n and stands at dense position (c // n) * m + index[c];
positions ascend within a group. A position takes 2 bits for m = 4 and 3 for m = 8. With b-bit values that is
(n / m) * (b + 2) or (n / m) * (b + 3) bits a weight: 4:8 has half a bit more than 2:4, and 70 choices of what it keeps
in 8 weights where 2:4 has 36. In bfloat16 2:4 has 9 bits, in int8 5, at hardly any loss beyond that of pruning, and in
int4 with groups of 64 3.25 (4:8 3.75, 2:8 2).
Source: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch" (2102.04010).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from hsai.errors import InputError
from hsai.formats.sparse import ByteValues, CodeValues, FloatValues, Sparse, SparseConfig
from hsai_kernels import POSITION_BITS, count_elements, pack_words

PATTERNS = ((1, 4), (2, 4), (3, 4), (1, 8), (2, 8), (4, 8))
"""Every (n, m)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NM(Sparse):
    """values (..., C, F) bfloat16 or float32; indices uint32 (..., C * b / 32, F) of b = 2 bits (m = 4) or 3 (m = 8);
    C = D * n / m kept elements."""

    values: jax.Array
    indices: jax.Array
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NMInt8(Sparse):
    """values int8 (..., C, F); indices as in NM; scale float32 (..., 1, F)."""

    values: jax.Array
    indices: jax.Array
    scale: jax.Array
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NMInt4(Sparse):
    """words uint32 (..., C / 8, F); indices as in NM; scale bfloat16 (..., D / group, F)."""

    signed_scale = True

    words: jax.Array
    indices: jax.Array
    scale: jax.Array
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class NMPattern(SparseConfig):
    """Keeps n of every m weights along the contraction."""

    n: int = 2
    """Weights kept in each group of m."""

    m: int = 4
    """Size of a sparsity group along the contraction: 4 or 8."""

    def __post_init__(self) -> None:
        if (self.n, self.m) not in PATTERNS:
            *first, last = (f"{n}:{m}" for n, m in PATTERNS)
            raise InputError(f"sparsity {self.n}:{self.m} is not supported; valid are {', '.join(first)} and {last}")

    @property
    def counts(self) -> tuple[int, int]:
        return self.n, self.m

    @property
    def tile(self) -> int:
        return index_block(self.n, self.m)

    @property
    def position_bits(self) -> float:
        return self.n / self.m * POSITION_BITS[self.m]

    @property
    def pattern_name(self) -> str:
        return f"{self.n}:{self.m}"

    def mask(self, w: jax.Array) -> jax.Array:
        return nm_mask(w, self.n, self.m)

    def select(self, w: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        values, indices = select_kept(w, mask, self.n, self.m)
        return {"values": values, "indices": pack_words(indices, POSITION_BITS[self.m])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NMConfig(FloatValues, NMPattern):
    """Keeps n of every m weights along the contraction."""

    format: Literal["nm"] = "nm"
    packed = NM


@dataclasses.dataclass(frozen=True, kw_only=True)
class NMInt8Config(ByteValues, NMPattern):
    """Keeps n of every m weights along the contraction, rounded to 8 bits with a scale an output."""

    format: Literal["nm_int8"] = "nm_int8"
    packed = NMInt8


@dataclasses.dataclass(frozen=True, kw_only=True)
class NMInt4Config(CodeValues, NMPattern):
    """Keeps n of every m weights along the contraction, rounded to 4 bits with a scale a group."""

    format: Literal["nm_int4"] = "nm_int4"
    packed = NMInt4


def index_block(n: int, m: int) -> int:
    """The smallest contraction whose kept positions fill whole 32-bit words (16 of 2 bits; 32 of 3 bits fill three)."""
    positions = count_elements(POSITION_BITS[m])
    return positions * m // n if positions % n == 0 else positions * m


def nm_mask(w: jax.Array, n: int, m: int) -> jax.Array:
    """True at the n largest magnitudes of each m along the contraction; of equals, the earlier. (..., D, F) -> bool."""
    *stack, size, outputs = w.shape
    groups = jnp.abs(w.reshape(*stack, size // m, m, outputs))
    if m > 8:
        return _keep_largest(groups, n).reshape(w.shape)
    each = [groups[..., i, :] for i in range(m)]

    def is_kept(i: int) -> jax.Array:
        """Fewer than n of the group stand before element i. Comparing all pairs costs a hundredth of sorting them."""
        before = [each[j] >= each[i] if j < i else each[j] > each[i] for j in range(m) if j != i]
        return jnp.sum(jnp.stack(before), axis=0, dtype=jnp.int8) < n

    return jnp.stack([is_kept(i) for i in range(m)], axis=-2).reshape(w.shape)


def _keep_largest(magnitudes: jax.Array, n: int) -> jax.Array:
    """True at the n largest of each (..., M, F) along axis -2, of equals at the earlier.

    Bits of floats that are not negative are in the order of the floats: the n-th largest is found a bit at a time.
    """
    bits = jax.lax.bitcast_convert_type(magnitudes.astype(jnp.float32), jnp.int32)

    def narrow(index: jax.Array, least: jax.Array) -> jax.Array:
        higher = least | (1 << (30 - index))
        return jnp.where(jnp.sum(bits >= higher, axis=-2, keepdims=True) >= n, higher, least)

    least = jax.lax.fori_loop(0, 31, narrow, jnp.zeros_like(bits[..., :1, :]))
    above, equal = bits > least, bits == least
    left = n - jnp.sum(above, axis=-2, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-2) <= left))


def select_kept(w: jax.Array, mask: jax.Array, n: int, m: int) -> tuple[jax.Array, jax.Array]:
    """The kept values (..., C, F) and their positions in their groups, uint8 (..., C, F), positions ascending."""
    *stack, size, outputs = w.shape
    groups = (*stack, size // m, m, outputs)
    positions = jnp.argsort(~mask.reshape(groups), axis=-2, stable=True)[..., :n, :]
    values = jnp.take_along_axis(w.reshape(groups), positions, axis=-2)
    kept = (*stack, size // m * n, outputs)
    return values.reshape(kept), positions.reshape(kept).astype(jnp.uint8)
