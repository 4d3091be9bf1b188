"""A small model and batches for it, made without a corpus."""

from typing import Any

import jax
import numpy as np

from hsai.data.packing import Batch
from hsai.models import TransformerConfig
from hsai.sharding import array_sharding

SMALL: dict[str, Any] = dict(
    vocab=96, embed=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128, max_length=32, dtype="float32"
)
MODEL = TransformerConfig(**SMALL)


def draw_batch(seed: int, rows: int = 8, length: int = 16, vocab: int = 96) -> Batch:
    """Rows of one or two documents; the last row is half padding, and one before it has a single target."""
    draw = np.random.default_rng(seed)
    # Skewed, so that there is something to learn in a few steps.
    stream = np.minimum(draw.geometric(0.08, (rows, length + 1)) - 1, vocab - 1).astype(np.int32)
    offsets = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    cut = draw.integers(1, length, (rows, 1))
    weights = np.ones((rows, length), np.float32)
    weights[-1, length // 2 :] = 0
    weights[-2, 1:] = 0
    return Batch(
        tokens=stream[:, :-1],
        targets=stream[:, 1:],
        segments=(offsets >= cut).astype(np.int32),
        positions=np.where(offsets < cut, offsets, offsets - cut).astype(np.int32),
        weights=weights,
    )


def place(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """The batch on the devices of a mesh."""
    return jax.tree.map(lambda x: jax.device_put(x, array_sharding(mesh, ("batch", "seq"), x.shape)), batch)
