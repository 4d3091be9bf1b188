"""NM: of every m consecutive weights along the contraction only n are kept, with their positions (N:M sparsity).

Invariant: kept element c of an output belongs to group c // n and stands at dense position (c // n) * m + index[c];
positions ascend within a group. A position takes 2 bits for m = 4 and 3 for m = 8. With b-bit values that is
(n / m) * (b + 2) or (n / m) * (b + 3) bits a weight: 4:8 has half a bit more than 2:4, and 70 choices of what it keeps
in 8 weights where 2:4 has 36.
Source: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch" (2102.04010).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from hsai.errors import InputError
from hsai.formats.packed import Packed, check_divides, check_finite
from hsai_kernels import POSITION_BITS, count_elements, densify_nm, pack_words

PATTERNS = ((1, 4), (2, 4), (3, 4), (1, 8), (2, 8), (4, 8))
"""Every (n, m)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NM(Packed):
    """values (..., C, F) bfloat16 or float32; indices uint32 (..., C * b / 32, F) of b = 2 bits (m = 4) or 3 (m = 8);
    C = D * n / m kept elements."""

    values: jax.Array
    indices: jax.Array
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, kept, outputs = self.values.shape
        return (*stack, kept * self.m // self.n, outputs)

    def dense(self) -> jax.Array:
        return densify_nm(self.values, self.indices, None, self.n, self.m, self.shape[-2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class NMConfig:
    """Keeps n of every m weights along the contraction."""

    format: Literal["nm"] = "nm"
    """Names this format in files."""

    n: int = 2
    """Weights kept in each group."""

    m: int = 4
    """Size of a group along the contraction: 4 or 8."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The stored precision of the kept values."""

    def __post_init__(self) -> None:
        check_pattern(self.n, self.m)

    def mask(self, w: jax.Array) -> jax.Array:
        """True where w (..., D, F) is kept by magnitude, bool (..., D, F)."""
        return nm_mask(w, self.n, self.m)

    def pack(self, w: jax.Array, mask: jax.Array | None = None) -> NM:
        """Packs w (..., D, F); `mask` (bool, n True in each group) chooses what is kept, by default the largest."""
        check_divides(f"{self.n}:{self.m} sparsity", index_block(self.n, self.m), w.shape[-2], w.shape)
        check_finite("the weight", w)
        values, indices = select_kept(w, self.mask(w) if mask is None else mask, self.n, self.m)
        return NM(values.astype(self.dtype), pack_words(indices, POSITION_BITS[self.m]), self.n, self.m)

    def invariant_bits(self, contraction: int) -> float:
        """Stored bits for each logical weight of a (contraction, F) matrix."""
        return self.n / self.m * (8.0 * jnp.dtype(self.dtype).itemsize + POSITION_BITS[self.m])


def check_pattern(n: int, m: int) -> None:
    """Raises `InputError` unless n:m is a pattern that the formats and kernels have."""
    if (n, m) not in PATTERNS:
        *first, last = (f"{n}:{m}" for n, m in PATTERNS)
        raise InputError(f"sparsity {n}:{m} is not supported; valid are {', '.join(first)} and {last}")


def index_block(n: int, m: int) -> int:
    """The smallest contraction whose kept positions fill whole 32-bit words (16 of 2 bits; 32 of 3 bits fill three)."""
    positions = count_elements(POSITION_BITS[m])
    return positions * m // n if positions % n == 0 else positions * m


def nm_mask(w: jax.Array, n: int, m: int) -> jax.Array:
    """True at the n largest magnitudes of each m along the contraction; of equals, the earlier. (..., D, F) -> bool."""
    *stack, size, outputs = w.shape
    groups = jnp.abs(w.reshape(*stack, size // m, m, outputs))
    each = [groups[..., i, :] for i in range(m)]

    def is_kept(i: int) -> jax.Array:
        """Fewer than n of the group stand before element i. Comparing all pairs costs a hundredth of sorting them."""
        before = [each[j] >= each[i] if j < i else each[j] > each[i] for j in range(m) if j != i]
        return jnp.sum(jnp.stack(before), axis=0, dtype=jnp.int8) < n

    return jnp.stack([is_kept(i) for i in range(m)], axis=-2).reshape(w.shape)


def select_kept(w: jax.Array, mask: jax.Array, n: int, m: int) -> tuple[jax.Array, jax.Array]:
    """The kept values (..., C, F) and their positions in their groups, uint8 (..., C, F), positions ascending."""
    *stack, size, outputs = w.shape
    groups = (*stack, size // m, m, outputs)
    positions = jnp.argsort(~mask.reshape(groups), axis=-2, stable=True)[..., :n, :]
    values = jnp.take_along_axis(w.reshape(groups), positions, axis=-2)
    kept = (*stack, size // m * n, outputs)
    return values.reshape(kept), positions.reshape(kept).astype(jnp.uint8)
