"""Sampling: drawn tokens follow the narrowed distribution, and follow the seed."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.errors import InputError
from hsai.infer.sampling import LOWEST_TEMPERATURE, Sampler, SamplingConfig

VOCAB = 12
LOGITS = np.random.default_rng(3).normal(0, 1.5, VOCAB).astype(np.float32)


def draw(config: SamplingConfig, logits: np.ndarray = LOGITS, rows: int = 4096, vocab: int = VOCAB) -> np.ndarray:
    """`rows` draws from the same logits."""
    return np.asarray(Sampler(config, vocab)(jnp.tile(jnp.asarray(logits), (rows, 1)), 0))


def narrow(config: SamplingConfig, logits: np.ndarray = LOGITS) -> np.ndarray:
    """The distribution that the config describes, token by token in plain Python."""
    scaled = logits.astype(np.float64) / config.temperature
    order = list(np.argsort(-scaled, kind="stable"))[: config.top_k or len(scaled)]
    weights = {token: float(np.exp(scaled[token] - scaled.max())) for token in order}
    total = sum(weights.values())
    kept, reached = [], 0.0
    for token in order:
        if config.top_p is not None and reached >= config.top_p:
            break
        kept.append(token)
        reached += weights[token] / total
    kept = [token for token in kept if weights[token] >= (config.min_p or 0.0) * weights[order[0]]]
    probabilities = np.zeros(len(scaled))
    for token in kept:
        probabilities[token] = weights[token]
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 100},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.3, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
    ],
)
def test_draws_follow_the_narrowed_distribution(options: dict[str, Any]) -> None:
    config = SamplingConfig(**options)
    expected = narrow(config)
    counts = np.bincount(draw(config), minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    # Five standard deviations of a binomial count, and one for the smallest.
    deviation = np.sqrt(4096 * expected * (1 - expected))
    assert (np.abs(counts - 4096 * expected) <= 5 * deviation + 1).all()


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    st.lists(st.floats(-30, 30, width=32), min_size=VOCAB, max_size=VOCAB),
    st.floats(0.05, 5),
    st.none() | st.integers(1, 15),
    st.none() | st.floats(0.05, 1),
    st.none() | st.floats(0, 1),
)
def test_draws_stay_within_what_is_kept(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    values = np.array(logits, np.float32)
    # Room for rounding of sums at the edge of what is kept.
    wider = SamplingConfig(
        temperature=temperature,
        top_k=top_k,
        top_p=None if top_p is None else min(1.0, top_p + 1e-5),
        min_p=None if min_p is None else min_p * (1 - 1e-5),
    )
    ties = np.isin(values, values[narrow(wider, values) > 0])
    assert ties[draw(config, values, rows=64)].all()


def test_greedy_takes_the_likeliest_and_of_equals_the_first() -> None:
    logits = np.array([0.0, 3.0, -1.0, 3.0] + [0.0] * 8, np.float32)
    assert set(draw(SamplingConfig(), logits, rows=3)) == {1}


def test_the_lowest_temperature_takes_the_likeliest() -> None:
    logits = np.r_[-30.0, 20.0, 19.9, np.zeros(VOCAB - 3)]
    assert set(draw(SamplingConfig(temperature=LOWEST_TEMPERATURE), logits).tolist()) == {1}


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_tokens_without_text_are_never_chosen(temperature: float) -> None:
    logits = np.concatenate([LOGITS, np.full(4, 50.0, np.float32)])
    assert draw(SamplingConfig(temperature=temperature), logits).max() < VOCAB


def test_draws_are_a_function_of_seed_and_step() -> None:
    logits = jnp.zeros((64, VOCAB))

    def choose(seed: int, step: int) -> list[int]:
        return np.asarray(Sampler(SamplingConfig(temperature=1.0, seed=seed), VOCAB)(logits, step)).tolist()

    assert choose(1, 5) == choose(1, 5)
    assert choose(1, 5) != choose(2, 5)
    assert choose(1, 5) != choose(1, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"temperature": 1e-39}, "temperature=1e-39 must be 0"),
        ({"seed": -1}, "seed=-1 must be between 0 and 4294967295"),
        ({"seed": 2**32}, "seed=4294967296 must be between 0 and"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"temperature": float("inf")}, "temperature=inf must be 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
        ({"temperature": 1.0, "min_p": -0.1}, "min_p=-0.1 must be between 0 and 1"),
        ({"top_k": 5}, "top_k=5 has no effect at temperature=0"),
        ({"top_p": 0.9}, "top_p=0.9 has no effect at temperature=0"),
        ({"min_p": 0.1}, "min_p=0.1 has no effect at temperature=0"),
    ],
)
def test_config_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingConfig(**options)
