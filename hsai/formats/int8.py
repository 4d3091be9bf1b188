"""Int8: one signed byte a weight, one float32 scale an output.

Invariant: w[d, f] = values[d, f] * scale[0, f], values in [-127, 127]; 8 + 32 / D bits a weight.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from hsai.formats.packed import Packed, check_finite, invert_scale
from hsai_kernels import dequantize_int8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(Packed):
    """values int8 (..., D, F); scale float32 (..., 1, F)."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dense(self) -> jax.Array:
        return dequantize_int8(self.values, self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Config:
    """Rounds to 8 bits with one scale an output."""

    format: Literal["int8"] = "int8"
    """Names this format in files."""

    def pack(self, w: jax.Array, scale: jax.Array | None = None) -> Int8:
        """Rounds w (..., D, F) to the nearest code; `scale` (..., 1, F) float32, by default max|w| / 127.

        Raises `InputError` for numbers that `check_finite` refuses.
        """
        check_finite("the weight", w)
        w = w.astype(jnp.float32)
        scale = (absmax_scale(w) if scale is None else scale).astype(jnp.float32)
        check_finite("the scale", scale, negative=False)
        return Int8(round_to_bytes(w, scale), scale)

    def invariant_bits(self, contraction: int) -> float:
        """Stored bits for each logical weight of a (contraction, F) matrix."""
        return 8.0 + 32.0 / contraction


def absmax_scale(w: jax.Array) -> jax.Array:
    """The scale that reaches the largest weight of each output: max|w| / 127, (..., D, F) float32 -> (..., 1, F)."""
    return jnp.max(jnp.abs(w), axis=-2, keepdims=True) / 127.0


def round_to_bytes(w: jax.Array, scale: jax.Array) -> jax.Array:
    """The nearest of -127 to 127 times the scale (..., 1, F): (..., D, F) float32 -> int8."""
    return jnp.clip(jnp.round(w * invert_scale(scale)), -127, 127).astype(jnp.int8)
