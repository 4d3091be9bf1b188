"""The divergence of two models' predictions against a plain sum over whole distributions in float64."""

import dataclasses

import numpy as np
import pytest

from hsai.errors import InputError
from hsai.evaluate.divergence import measure_divergence
from hsai.evaluate.scorer import Scorer
from hsai.models import Transformer
from tests.evaluate.test_scorer import draw_groups
from tests.export.tiny_models import full_logits, make_model


def _log_probabilities(model: Transformer, groups: list) -> np.ndarray:
    """Of each scored token's whole vocabulary, float64 (N, V)."""
    rows = []
    for group in groups:
        for pair in group:
            tokens = np.array((pair.context + pair.continuation)[-(model.config.max_length + 1) :])
            rows.append(full_logits(model, tokens[:-1]).astype(np.float64)[-len(pair.continuation) :])
    logits = np.concatenate(rows)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_against_plain_sums(model: Transformer) -> None:
    groups = draw_groups(1)
    other = make_model(vocab=model.config.vocab, seed=7)
    scores, mine = Scorer(model, batch_tokens=64).score_and_read(groups)
    assert scores == Scorer(model, batch_tokens=64).score(groups)
    _, theirs = Scorer(other, batch_tokens=128).score_and_read(groups)
    true, held = _log_probabilities(model, groups), _log_probabilities(other, groups)
    expected = (np.exp(true) * (true - held)).sum(axis=1)
    kl, same = measure_divergence(model, mine, other, theirs)
    assert kl.name == "kl" and same.name == "same_choice"
    assert kl.n == same.n == len(expected) > 20
    assert kl.value == pytest.approx(expected.mean(), rel=1e-5)
    assert kl.standard_error == pytest.approx(expected.std(ddof=1) / np.sqrt(len(expected)), rel=1e-4)
    assert same.value == np.mean(true.argmax(axis=1) == held.argmax(axis=1)) < 1


def test_a_model_does_not_differ_from_itself(model: Transformer) -> None:
    _, hidden = Scorer(model).score_and_read(draw_groups(2))
    kl, same = measure_divergence(model, hidden, model, hidden)
    assert 0 <= kl.value < 1e-7 and same.value == 1


def test_other_vocabularies_are_refused(model: Transformer) -> None:
    _, hidden = Scorer(model).score_and_read(draw_groups(2))
    other = make_model(vocab=model.config.vocab + 8)
    with pytest.raises(InputError, match=f"of {model.config.vocab + 8} tokens .* one of {model.config.vocab}"):
        measure_divergence(model, hidden, other, hidden)


def test_certain_predictions_stay_finite(model: Transformer) -> None:
    """Hidden states so large that all but one token have no probability at all in float32."""
    _, hidden = Scorer(model).score_and_read(draw_groups(2))
    loud = [rows * 1e4 for rows in hidden]
    kl, _ = measure_divergence(model, loud, model, [-rows for rows in loud])
    assert np.isfinite(kl.value) and kl.value > 100
    assert dataclasses.asdict(measure_divergence(model, loud, model, loud)[0])["value"] == 0
