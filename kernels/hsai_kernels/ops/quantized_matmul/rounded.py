"""Products with activations rounded to int8, as an accelerator makes them: what TPU and GPU kernels have in common.

Every row's group of positions that shares a scale of the weight has a step of its own, so that a sum of integers ends
with each group. Rounding needs all of a group before the first product: it is plain jax, in front of the kernel, which
reads one byte a position where bfloat16 has two. A kernel gets integers of at most 8 bits on both sides, and gives

    sum over groups of float32(int32 sum of the group's products) * step * scale

as the reference does. The sums of integers are the same bits; how float32 adds the groups is the kernel's.

Dimensions: R rows, D contraction, F output, G groups of D/G positions that share a scale.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from hsai_kernels.ops.quantized_matmul.reference import round_activations


class Multiply(Protocol):
    """A kernel: (R, F) from codes int8 (R, D), step float32 (R, G), the weight's integers as packed, scale (G, F)."""

    def __call__(
        self, codes: jax.Array, step: jax.Array, values: jax.Array, scale: jax.Array, dtype: jnp.dtype
    ) -> jax.Array: ...


def multiply_rounded(
    multiply: Multiply,
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    minimum: jax.Array | None,
) -> jax.Array:
    """(..., F) in x's dtype: x (..., D), rounded, times the weight; arguments as in api.py, already validated.

    What minima add is a product of the groups' sums, of 1 / g of the work, by XLA.
    """
    *lead, contraction = x.shape
    codes, step = round_activations(x.reshape(-1, contraction), scale.shape[0])
    dtype = x.dtype if minimum is None else jnp.dtype(jnp.float32)
    out = multiply(codes.reshape(-1, contraction), step, values, scale, dtype)
    if minimum is not None:
        totals = jnp.sum(codes.astype(jnp.int32), axis=-1).astype(jnp.float32) * step
        out += jnp.matmul(totals, minimum.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return out.astype(x.dtype).reshape(*lead, -1)


class Levels(NamedTuple):
    """Of words of codes: the integers of at most 8 bits that codes stand for in a kernel."""

    bits: int
    doubled: bool
    """Whether it is 2 * code - zero, which is twice what is meant, else code - zero."""
    zero: int


def find_levels(values: jax.Array, bits: int, centered: bool, minimum: jax.Array | None) -> Levels | None:
    """None for int8 values. Halves of a level, where codes are centered, are odd integers; codes with a minimum count
    from it."""
    if values.dtype == jnp.int8:
        return None
    if minimum is not None:
        return Levels(bits, False, 0)
    return Levels(bits, True, 2**bits - 1) if centered else Levels(bits, False, 2 ** (bits - 1))


def widen_scale(levels: Levels | None, scale: jax.Array) -> jax.Array:
    """float32: the scale of a kernel's integers."""
    wide = scale.astype(jnp.float32)
    return wide / 2 if levels is not None and levels.doubled else wide


def name_kernel(values: jax.Array | jax.ShapeDtypeStruct, bits: int) -> str:
    """The kernel's name, for tiles."""
    return f"quantized_matmul int{8 if values.dtype == jnp.int8 else bits}, rounded activations"
