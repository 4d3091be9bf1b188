"""What scores are worth: metrics and their standard errors, as lm_eval.api.metrics and lm_eval.api.task define them."""

import dataclasses
import math
from collections.abc import Sequence

from hsai.evaluate.scorer import Score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of a task."""

    name: str
    """acc, acc_norm, perplexity, bits_per_byte."""

    value: float

    standard_error: float | None
    """None of a single document, and where the harness knows none."""

    n: int
    """Documents, or tokens of a perplexity, that it is the mean over."""

    values: tuple[float, ...] = dataclasses.field(default=(), repr=False, compare=False)
    """What it is the mean of, in order, of a perplexity -log p; empty of one that has parts, and where it is no mean
    over n."""

    parts: "tuple[Metric, ...]" = dataclasses.field(default=(), repr=False, compare=False)
    """Those that it was pooled from."""


def is_right(scores: Sequence[Score], gold: int) -> bool:
    """acc: the answer with the largest log-likelihood is the right one; of equal ones the first counts."""
    return _largest([score.log_likelihood for score in scores]) == gold


def is_right_by_length(scores: Sequence[Score], answers: Sequence[str], gold: int) -> bool:
    """acc_norm: log-likelihoods are divided by the characters of the answers, without the space before them."""
    return _largest([score.log_likelihood / len(text) for score, text in zip(scores, answers, strict=True)]) == gold


def average(name: str, values: Sequence[float]) -> Metric:
    """The mean, and its standard error: the sample's deviation (n - 1) over sqrt(n)."""
    n, mean = len(values), sum(values) / len(values)
    error = None if n < 2 else math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return Metric(name=name, value=mean, standard_error=error, n=n, values=tuple(values))


def perplexity(log_likelihoods: Sequence[float]) -> Metric:
    """exp of the mean -log p, of documents or of tokens.

    Its standard error is that of the mean times the perplexity (the first term of its expansion, as llama.cpp has it);
    the harness draws samples with replacement, which comes to the same for many documents.
    """
    mean = average("perplexity", [-value for value in log_likelihoods])
    value = math.exp(mean.value)
    error = None if mean.standard_error is None else mean.standard_error * value
    return dataclasses.replace(mean, value=value, standard_error=error)


def pool(name: str, parts: Sequence[Metric]) -> Metric:
    """The mean over all documents of several tasks (the harness's mmlu), with its pooled standard error."""
    n = sum(part.n for part in parts)
    value = sum(part.value * part.n for part in parts) / n
    spreads = [(part.n - 1) * part.n * part.standard_error**2 for part in parts if part.standard_error is not None]
    known = len(spreads) == len(parts)
    error = math.sqrt(sum(spreads) / (n - len(parts)) / n) if known else None
    return Metric(name=name, value=value, standard_error=error, n=n, parts=tuple(parts))


def compare(first: Metric, other: Metric) -> Metric:
    """How `other` differs from `first`, both of the same documents or tokens, with the standard error of pairs.

    What one model finds hard the other mostly does too, and what they share takes no part in the error: it is that of
    the mean of the differences, item by item (2411.00640 argues for it). Of a perplexity the ratio is given: exp of the
    mean difference, and its error by the first term of its expansion, as that of the perplexity itself. Pooled metrics
    are compared part by part. Where the items are not known, neither is the error.

    Returns:
      "difference" (other - first), or "ratio" (other / first) of a perplexity.
    Raises:
      ValueError: they are not of the same number of items.
    """
    if first.n != other.n:
        raise ValueError(f"{first.name} over {first.n} items cannot be paired with {other.name} over {other.n}")
    if first.parts:
        return pool("difference", [compare(*pair) for pair in zip(first.parts, other.parts, strict=True)])
    if not first.values:
        return Metric(name="difference", value=other.value - first.value, standard_error=None, n=first.n)
    changes = [after - before for before, after in zip(first.values, other.values, strict=True)]
    if first.name == "perplexity":
        return dataclasses.replace(perplexity([-change for change in changes]), name="ratio")
    return average("difference", changes)


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: values[index])
