"""Metrics against lm_eval's own functions."""

import math

import numpy as np
import pytest
from lm_eval.api import metrics as theirs

from hsai.evaluate.metrics import Metric, average, compare, is_right, is_right_by_length, perplexity, pool
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


def resample(*columns: np.ndarray) -> list[np.ndarray]:
    """Means (2000,) of each column (N,) over documents that are drawn with replacement, the same for all columns."""
    n = len(columns[0])
    drawn = [np.random.default_rng(seed).integers(0, n, n) for seed in range(2000)]
    return [np.array([column[index].mean() for index in drawn]) for column in columns]


def test_differences_are_paired() -> None:
    """Two models of which one fails mostly where the other does."""
    hard = DRAW.random(400)
    before, after = ((hard + DRAW.normal(0, 0.1, 400) < edge).astype(float) for edge in (0.6, 0.55))
    first, other = average("acc", before.tolist()), average("acc", after.tolist())
    found = compare(first, other)
    assert (found.name, found.n) == ("difference", 400)
    assert found.value == pytest.approx(after.mean() - before.mean(), rel=1e-12)
    assert found.standard_error == pytest.approx((after - before).std(ddof=1) / np.sqrt(400), rel=1e-12)
    ones, twos = resample(before, after)
    assert found.standard_error == pytest.approx((twos - ones).std(ddof=1), rel=0.1)
    assert first.standard_error and other.standard_error and found.standard_error
    assert found.standard_error < 0.7 * math.hypot(first.standard_error, other.standard_error)
    # Documents in another order are other pairs: what two models share is in their order alone.
    shuffled = compare(first, average("acc", DRAW.permutation(after).tolist()))
    assert shuffled.value == pytest.approx(found.value) and shuffled.standard_error > 1.4 * found.standard_error  # type: ignore[operator]


def test_ratios_of_perplexities_are_paired() -> None:
    before = DRAW.normal(-2, 1.5, 1000)
    after = before * 1.1 + DRAW.normal(0, 0.2, 1000)
    first, other = perplexity(before.tolist()), perplexity(after.tolist())
    found = compare(first, other)
    assert (found.name, found.n) == ("ratio", 1000)
    assert found.value == pytest.approx(other.value / first.value, rel=1e-12)
    ones, twos = resample(before, after)
    assert found.standard_error == pytest.approx((np.exp(-twos) / np.exp(-ones)).std(ddof=1), rel=0.1)
    assert first.standard_error and other.standard_error and found.standard_error
    alone = found.value * math.hypot(first.standard_error / first.value, other.standard_error / other.value)
    assert found.standard_error < 0.3 * alone


def test_pooled_differences() -> None:
    """Against lm_eval's pool of the differences of each part."""
    draws = [[(DRAW.random(n) < 0.5).astype(float) for n in (30, 100, 7)] for _ in range(2)]
    first, other = (pool("acc", [average("acc", part.tolist()) for part in parts]) for parts in draws)
    changes = [after - before for before, after in zip(*draws, strict=True)]
    found = compare(first, other)
    assert (found.name, found.n) == ("difference", 137)
    assert found.value == pytest.approx(np.concatenate(changes).mean(), rel=1e-12)
    errors = [theirs.mean_stderr(part.tolist()) for part in changes]
    assert found.standard_error == pytest.approx(theirs.pooled_sample_stderr(errors, [30, 100, 7]), rel=1e-12)


def test_a_model_does_not_differ_from_itself() -> None:
    values = DRAW.normal(-2, 1.5, 50).tolist()
    for metric, same in (
        (average("acc", values), 0.0),
        (perplexity(values), 1.0),
        (pool("acc", [average("acc", values), average("acc", values[:9])]), 0.0),
    ):
        found = compare(metric, metric)
        assert (found.value, found.standard_error) == (same, 0.0)


def test_what_cannot_be_paired() -> None:
    bits = [Metric(name="bits_per_byte", value=value, standard_error=None, n=9) for value in (1.0, 1.25)]
    found = compare(*bits)
    assert (found.value, found.standard_error) == (0.25, None)
    assert compare(average("acc", [0.0]), average("acc", [1.0])).standard_error is None
    with pytest.raises(ValueError, match="acc over 2 items cannot be paired with acc over 3"):
        compare(average("acc", [0.0, 1.0]), average("acc", [0.0, 1.0, 1.0]))


def test_choices() -> None:
    scores = [make_score(-3.0), make_score(-4.0), make_score(-3.0)]
    assert is_right(scores, 0) and not is_right(scores, 2)  # of equal ones, the first
    answers = ("abc", "abcdefgh", "数据数")  # characters count, not bytes: -1, -0.5, -1
    assert is_right_by_length(scores, answers, 1) and not is_right_by_length(scores, answers, 2)
