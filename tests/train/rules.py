"""Rules of formats that tests train with, and what masks have to be."""

from typing import Any

import numpy as np

from hsai.formats import (
    FormatConfig,
    NMConfig,
)
from hsai.train.formats import FormatRule, Rules

SPARSE24 = FormatRule(pattern="layers.*", format=NMConfig(n=2, m=4, dtype="float32"))


def one(format: FormatConfig, **how: Any) -> Rules:
    """A rule for all blocks."""
    return (FormatRule(pattern="layers.*", format=format, **how),)


def keep_largest(w: np.ndarray, n: int) -> np.ndarray:
    """Which weights are among the n largest of their 4 along the contraction; loops, of equals the earlier."""
    mask = np.zeros(w.shape, bool)
    for layer, group, column in np.ndindex(w.shape[0], w.shape[1] // 4, w.shape[2]):
        four = np.abs(w[layer, 4 * group : 4 * group + 4, column])
        for index in sorted(range(4), key=lambda index: (-four[index], index))[:n]:
            mask[layer, 4 * group + index, column] = True
    return mask


def in_blocks(name: str) -> bool:
    return name.startswith("layers.") and not name.endswith("gain")
