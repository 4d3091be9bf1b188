"""Held-out quality in bits a byte: comparable between tokenizers, formats and model sizes."""

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from hsai.data.packing import Batch
from hsai.models import Transformer
from hsai.train.step import batch_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """How well a model predicts text."""

    nats: float
    """Summed -log p of the targets, end-of-text included."""

    tokens: int
    """Targets."""

    bytes: int
    """UTF-8 bytes that the targets stand for."""

    @property
    def bits_per_byte(self) -> float:
        """Summed -log2 p over bytes: what an ideal coder would need for a byte of this text."""
        return self.nats / math.log(2) / self.bytes

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens


Sums = tuple[jax.Array, jax.Array, jax.Array]


def make_evaluation(token_bytes: np.ndarray, *, chunk: int) -> Callable[[Transformer, Iterable[Batch]], Quality]:
    """A function (model, batches) -> Quality that is compiled once for all its calls.

    Args:
      token_bytes: int32 (V,), the bytes that each token stands for.
      chunk: positions of a row whose logits exist together.
    """
    sizes = jnp.asarray(token_bytes, jnp.float32)

    @jax.jit
    def sums(model: Transformer, batch: Batch) -> Sums:
        _, found = batch_loss(model, batch, chunk=chunk)
        return found.loss, found.targets, jnp.sum(batch.weights * sizes[batch.targets])

    def evaluate(model: Transformer, batches: Iterable[Batch]) -> Quality:
        # Sums of a batch fit float32 exactly enough; sums over all batches are kept in Python's float64.
        nats, tokens, size = 0.0, 0.0, 0.0
        for batch in batches:
            loss, count, found = jax.device_get(sums(model, batch))
            nats, tokens, size = nats + float(loss), tokens + float(count), size + float(found)
        return Quality(nats=nats, tokens=int(tokens), bytes=int(size))

    return evaluate
