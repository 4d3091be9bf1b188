"""Held-out quality: sums over batches, padding left out, bytes counted."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from hsai.models import Transformer
from hsai.train.evaluate import Quality, make_evaluation
from tests.train.batches import MODEL, draw_batch

TOKEN_BYTES = np.arange(96, dtype=np.int32) % 5


@pytest.fixture(scope="module")
def model() -> Transformer:
    return jax.jit(lambda: Transformer(MODEL, rngs=nnx.Rngs(0)))()


def test_bits_per_byte_by_hand() -> None:
    quality = Quality(nats=16 * math.log(2), tokens=8, bytes=32)
    assert quality.bits_per_byte == pytest.approx(0.5)
    assert quality.loss == pytest.approx(2 * math.log(2))


def test_quality_is_the_sum_over_all_targets_that_count(model: Transformer) -> None:
    batches = [draw_batch(seed) for seed in range(3)]
    nats, tokens, size = 0.0, 0, 0
    forward = jax.jit(lambda b: model.logits(model(b.tokens, positions=b.positions, segments=b.segments)[0]))
    for batch in batches:
        logits = np.asarray(forward(batch), np.float64)
        chances = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        for row, column in zip(*np.nonzero(batch.weights), strict=True):
            target = batch.targets[row, column]
            nats -= math.log(chances[row, column, target])
            tokens, size = tokens + 1, size + int(TOKEN_BYTES[target])
    found = make_evaluation(TOKEN_BYTES, chunk=8)(model, iter(batches))
    assert (found.tokens, found.bytes) == (tokens, size)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert tokens < 3 * batches[0].weights.size  # there was padding to leave out
