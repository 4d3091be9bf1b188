"""How far one model's predictions are from another's: the Kullback-Leibler divergence of whole distributions.

A perplexity can stay the same while answers change; the divergence from the dense model cannot (2407.09141 argues so
for compressed models). The first model's hidden states at the scored tokens are kept, D numbers a token and not V, and
both models' logits are made again for C tokens at a time.

D embed, V vocabulary, N scored tokens, C of them whose logits exist together.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.evaluate.metrics import Metric, average, compare
from hsai.evaluate.scorer import CHUNK, Scorer
from hsai.models import Transformer


class Reference:
    """The model that others are compared with, and what it made of each text.

    Attributes:
      scorer: of a model that is dense, mostly, and its cache exact.
      tokenizer: of it; a model with another one is not compared.
      hidden: of each pair of a text, float32 (tokens, D), of `Scorer.score_and_read`.
      metrics: of each task.
    Both by the task's name and settings: a text in other windows is not compared.
    """

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer) -> None:
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.hidden: dict[tuple[object, ...], list[np.ndarray]] = {}
        self.metrics: dict[tuple[object, ...], tuple[Metric, ...]] = {}

    def can_judge(self, tokenizer: Tokenizer) -> bool:
        """Whether a model with this tokenizer predicts the same tokens."""
        return tokenizer.cuts_like(self.tokenizer)

    def compare(
        self, task: str, settings: Mapping[str, int], metrics: Sequence[Metric], scorer: Scorer, tokenizer: Tokenizer
    ) -> dict[str, Metric]:
        """By name, how a model's metrics of a task differ from this one's (`hsai.evaluate.metrics.compare`).

        None do of the reference's own scorer, whose metrics are kept. Documents are the same for every model, and so
        are the bytes of a whole text; tokens only of one tokenizer.
        """
        key = (task, *settings.items())
        if scorer is self.scorer:
            self.metrics[key] = tuple(metrics)
            return {}
        firsts = {first.name: first for first in self.metrics.get(key, ())}
        if settings and not self.can_judge(tokenizer):
            sizes = {metric.name: metric.n for metric in metrics if metric.name == "bits_per_byte"}
            firsts = {name: first for name, first in firsts.items() if sizes.get(name) == first.n}
        return {metric.name: compare(firsts[metric.name], metric) for metric in metrics if metric.name in firsts}


def measure_divergence(
    reference: Transformer, reference_hidden: Sequence[np.ndarray], model: Transformer, hidden: Sequence[np.ndarray]
) -> tuple[Metric, Metric]:
    """KL(reference || model) in nats a token, and the share of tokens whose likeliest successor is the same.

    Args:
      reference: whose distribution is the true one.
      reference_hidden: of each pair, float32 (tokens, D), of `Scorer.score_and_read`.
      model: of the same vocabulary.
      hidden: of the same pairs.
    Raises:
      InputError: the vocabularies differ in size.
    """
    if reference.config.vocab != model.config.vocab:
        raise InputError(
            f"a model of {model.config.vocab} tokens cannot be compared with one of {reference.config.vocab}"
        )
    mine, theirs = (np.concatenate(list(parts)) for parts in (hidden, reference_hidden))
    divergences: list[float] = []
    equal: list[float] = []
    for start in range(0, len(mine), CHUNK):
        parts = [np.zeros((CHUNK, rows.shape[1]), np.float32) for rows in (theirs, mine)]
        count = min(CHUNK, len(mine) - start)
        for part, rows in zip(parts, (theirs, mine), strict=True):
            part[:count] = rows[start : start + count]
        found, same = jax.device_get(_compare(reference, parts[0], model, parts[1]))
        divergences += found[:count].tolist()
        equal += same[:count].astype(float).tolist()
    return average("kl", divergences), average("same_choice", equal)


@jax.jit
def _compare(
    reference: Transformer, reference_hidden: jax.Array, model: Transformer, hidden: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """KL float32 (C,), at least 0, and bool (C,), of hidden states (C, D)."""
    true, held = (
        part.logits(rows[None].astype(part.config.dtype))[0]
        for part, rows in ((reference, reference_hidden), (model, hidden))
    )
    log_true, log_held = jax.nn.log_softmax(true), jax.nn.log_softmax(held)
    # Where p is 0 in float32 its term is 0 too, whatever the other model says.
    terms = jnp.where(log_true > -100.0, jnp.exp(log_true) * (log_true - log_held), 0.0)
    return jnp.maximum(jnp.sum(terms, axis=1), 0.0), jnp.argmax(true, axis=1) == jnp.argmax(held, axis=1)
