"""NM: of every m consecutive weights along the contraction only n are kept, with 2-bit positions (N:M sparsity).

Invariant: kept element c of an output belongs to group c // n and stands at dense position (c // n) * m + index[c];
positions ascend within a group. With b-bit values: (n / m) * (b + 2) bits a weight.
Source: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch" (2102.04010).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from hsai.errors import InputError
from hsai.formats.packed import Packed, check_divides, check_finite
from hsai_kernels import densify_nm, pack_words


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NM(Packed):
    """values (..., C, F) bfloat16 or float32; indices uint32 (..., C / 16, F); C = D * n / m kept elements."""

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
    """Size of a group along the contraction; 4 is what the 2-bit positions reach."""

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
        return NM(values.astype(self.dtype), pack_words(indices, 2), self.n, self.m)

    def invariant_bits(self, contraction: int) -> float:
        """Stored bits for each logical weight of a (contraction, F) matrix."""
        return self.n / self.m * (8.0 * jnp.dtype(self.dtype).itemsize + 2.0)


def check_pattern(n: int, m: int) -> None:
    """Raises `InputError` unless n:m is a pattern that the 2-bit positions can hold."""
    if m != 4 or not 1 <= n < m:
        raise InputError(f"sparsity {n}:{m} is not supported; valid are 1:4, 2:4 and 3:4")


def index_block(n: int, m: int) -> int:
    """The smallest contraction whose kept positions fill whole 32-bit words (16 positions each)."""
    return 16 * m // n if 16 % n == 0 else 16 * m


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
