"""Weights to be solved, and what they are multiplied by."""

import numpy as np


def draw(seed: int, size: int, outputs: int, *, tokens: int = 400, correlated: bool = True):
    """w (D, F) and X^T X of activations with few strong directions, as those of transformers are."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, size))
    if correlated:
        x = x @ (rng.standard_normal((size, size)) * rng.lognormal(0, 1, size)) / size**0.5
    return rng.standard_normal((size, outputs)).astype(np.float32), (x.T @ x).astype(np.float32), x
