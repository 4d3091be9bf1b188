"""Metrics against lm_eval's own functions."""

import math

import numpy as np
import pytest
from lm_eval.api import metrics as theirs

from hsai.evaluate.metrics import Metric, average, is_right, is_right_by_length, perplexity, pool
from hsai.evaluate.scorer import Score

DRAW = np.random.default_rng(0)


def make_score(value: float) -> Score:
    return Score(token_log_likelihoods=(value,), is_greedy=False)


def test_average() -> None:
    values = (DRAW.random(200) < 0.3).astype(float).tolist()
    metric = average("acc", values)
    assert (metric.value, metric.n) == (theirs.mean(values), 200)
    assert metric.standard_error == pytest.approx(theirs.mean_stderr(values), rel=1e-12)
    assert average("acc", [1.0]).standard_error is None


def test_perplexity() -> None:
    values = DRAW.normal(-2, 1.5, 1000).tolist()
    metric = perplexity(values)
    assert metric.value == pytest.approx(theirs.perplexity(values), rel=1e-12)
    resampled = np.exp(-DRAW.choice(values, (2000, len(values))).mean(axis=1))  # what the harness's bootstrap draws
    assert metric.standard_error == pytest.approx(resampled.std(ddof=1), rel=0.1)
    assert perplexity([-math.log(8.0)]) == Metric(name="perplexity", value=pytest.approx(8.0), standard_error=None, n=1)


def test_pool() -> None:
    parts = [average("acc", (DRAW.random(n) < 0.5).astype(float).tolist()) for n in (30, 100, 7)]
    pooled, sizes = pool("acc", parts), [part.n for part in parts]
    assert pooled.n == 137
    assert pooled.value == pytest.approx(theirs.aggregate_subtask_metrics([part.value for part in parts], sizes))
    errors = [part.standard_error for part in parts]
    assert pooled.standard_error == pytest.approx(theirs.pooled_sample_stderr(errors, sizes), rel=1e-12)  # type: ignore[arg-type]
    assert pool("acc", [*parts, average("acc", [1.0])]).standard_error is None


def test_choices() -> None:
    scores = [make_score(-3.0), make_score(-4.0), make_score(-3.0)]
    assert is_right(scores, 0) and not is_right(scores, 2)  # of equal ones, the first
    answers = ("abc", "abcdefgh", "数据数")  # characters count, not bytes: -1, -0.5, -1
    assert is_right_by_length(scores, answers, 1) and not is_right_by_length(scores, answers, 2)
