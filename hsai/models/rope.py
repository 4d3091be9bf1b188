"""Rotary position embedding (2104.09864), with the context-extension scalings of released models.

The rotation pairs element i with element i + H/2, as released checkpoints in safetensors form expect.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from hsai.errors import InputError
from hsai_kernels import rope

Rotation = tuple[jax.Array, jax.Array]
"""Cosine and sine of each token's angle with each pair, float32 (B, T, 1, H / 2)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Stretches the rotation's wavelengths, so that a model reads contexts longer than it was first trained on."""

    kind: Literal["linear", "llama3"]
    """linear: every frequency is divided by `factor`; llama3: only the slow ones are (Llama 3.1 model card)."""

    factor: float
    """How much longer the context becomes."""

    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_length / low_freq_factor are stretched in full."""

    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_length / high_freq_factor are left alone."""

    original_length: int = 8192
    """llama3: the context length before scaling, in tokens."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise InputError(f"rope scaling factor={self.factor} must be at least 1")
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"rope scaling high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding."""

    theta: float = 10_000.0
    """Base of the geometric series of wavelengths."""

    scaling: RopeScaling | None = None
    """Context extension; none leaves the wavelengths as they are."""

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise InputError(f"rope theta={self.theta} must exceed 1")


def frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians a token for each of the H/2 pairs, float32."""
    freq = config.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = config.scaling
    if scaling is None:
        return freq.astype(np.float32)
    if scaling.kind == "linear":
        return (freq / scaling.factor).astype(np.float32)
    # The number of turns within the original context decides: few turns, stretch; many turns, keep; between, blend.
    turns = scaling.original_length * freq / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (keep * freq + (1 - keep) * freq / scaling.factor).astype(np.float32)


def make_rotation(positions: jax.Array, config: RopeConfig, head_dim: int) -> Rotation:
    """The turns of each token: made once, outside of the scan over layers, since sines are dear and all layers agree.

    Args:
      positions: (B, T) int32.
      config: the wavelengths.
      head_dim: H.
    """
    angles = positions[..., None, None].astype(jnp.float32) * frequencies(config, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates each head by its token's position: (B, T, N, H) -> the same, in x's dtype, computed in float32."""
    cos, sin = rotation
    return rope(x, cos, sin)
