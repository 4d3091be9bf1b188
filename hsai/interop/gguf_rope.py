"""Llama 3's rope scaling as GGUF says it: a tensor of what each frequency is divided by.

The tensor is made by the formula of `hsai.models.rope`; read, the formula's constants are found again from it.
"""

import math

import numpy as np

from hsai.errors import InputError
from hsai.models import RopeConfig, RopeScaling
from hsai.models.rope import frequencies

TOLERANCE = 1e-6
"""Relative: how far frequencies may lie apart and be the same; float32 leaves some 1e-7."""


def rope_factors(config: RopeConfig, head_dim: int) -> np.ndarray:
    """float32 (H / 2): the frequencies without scaling, divided by those with it."""
    plain = frequencies(RopeConfig(theta=config.theta), head_dim)
    return (plain / frequencies(config, head_dim)).astype(np.float32)


def same_rotation(one: RopeConfig, other: RopeConfig, head_dim: int) -> bool:
    """Whether two configs turn the same, however they say it."""
    return bool(np.allclose(frequencies(one, head_dim), frequencies(other, head_dim), rtol=TOLERANCE, atol=0))


def fit_scaling(factors: np.ndarray, theta: float, head_dim: int, path: str) -> RopeScaling | None:
    """The scaling that `factors` (H / 2) were made with; None if they change nothing.

    In the blend, 1 / factor is linear in the frequency. That line gives two of three constants, and only their ratios
    matter: the low frequency factor is taken to be 1, which it is in every released model.

    Raises:
      InputError: they are not of Llama 3's form.
    """
    refused = InputError(f"{path}: its rope factors are not those of Llama 3's scaling; no other is read")
    if factors.shape != (head_dim // 2,) or not np.all(np.isfinite(factors) & (factors >= 1)):
        raise refused
    if np.all(factors == 1):
        return None
    factor = float(factors.max())
    freq = frequencies(RopeConfig(theta=theta), head_dim).astype(np.float64) / (2 * math.pi)
    keep = (1 / factors.astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    blended = (keep > 1e-4) & (keep < 1 - 1e-4)
    for original, high in _guess(freq, keep, blended):
        if not (math.isfinite(original) and original >= 1 and high > 1):
            continue
        rounded = RopeScaling(
            kind="llama3",
            factor=round(factor, 5),
            high_freq_factor=round(float(high), 3),
            original_length=round(original),
        )
        found = rope_factors(RopeConfig(theta=theta, scaling=rounded), head_dim)
        if np.allclose(found, factors, rtol=TOLERANCE, atol=0):
            return rounded
    raise refused


def _guess(freq: np.ndarray, keep: np.ndarray, blended: np.ndarray) -> list[tuple[float, float]]:
    """Pairs (original length, high frequency factor) that may have made `keep` of the frequencies, in turns a token."""
    if blended.sum() >= 2:  # keep = (original * freq - 1) / (high - 1)
        slope, intercept = np.polyfit(freq[blended], keep[blended], 1)
        return [(-slope / intercept, 1 - 1 / intercept)] if intercept < 0 else []
    if blended.sum() == 1:
        return [((keep[blended][0] * 3 + 1) / freq[blended][0], 4.0)]
    # Nothing is blended: any bounds between the last frequency that is kept and the first that is not.
    kept, scaled = freq[keep >= 0.5], freq[keep < 0.5]
    fastest = float(scaled.max())
    slowest = float(kept.min()) if kept.size else math.inf
    original = math.floor(0.999 / fastest)
    return [(original, min(4.0, original * slowest * 0.999))]
