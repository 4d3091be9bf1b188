"""Sampling: drawn tokens follow the narrowed distribution, and follow the seed."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.errors import InputError
from hsai.infer.choose import Chosen, Extras, choose_tokens, stack_settings
from hsai.infer.runtime import make_extras
from hsai.infer.sampling import LOWEST_TEMPERATURE, SamplingConfig

VOCAB = 12
LOGITS = np.random.default_rng(3).normal(0, 1.5, VOCAB).astype(np.float32)

choose = jax.jit(choose_tokens, static_argnames=("kind", "vocab"))


def draw(config: SamplingConfig, logits: np.ndarray = LOGITS, rows: int = 4096, vocab: int = VOCAB) -> np.ndarray:
    """The first `rows` draws of a text whose logits never change."""
    settings = stack_settings([(config, step) for step in range(rows)], rows)
    return np.asarray(choose(jnp.tile(jnp.asarray(logits), (rows, 1)), settings, None, kind="drawn", vocab=vocab).token)


def choose_fully(
    rows: list[tuple[SamplingConfig, int]], logits: np.ndarray, extras: Extras, vocab: int = VOCAB
) -> Chosen:
    return jax.device_get(
        choose(jnp.asarray(logits), stack_settings(rows, len(rows)), extras, kind="full", vocab=vocab)
    )


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


def test_draws_of_a_large_vocabulary_follow_its_distribution() -> None:
    """Of an odd size, most of it without any weight, the first and last token with some; equals at the threshold."""
    vocab = 1287
    logits = np.full(vocab, -1000.0, np.float32)
    chances = {0: 0.1, 255: 0.2, 256: 0.3, 777: 0.15, vocab - 1: 0.25}
    for token, chance in chances.items():
        logits[token] = np.log(chance)
    counts = np.bincount(draw(SamplingConfig(temperature=1.0), logits, vocab=vocab), minlength=vocab)
    for token, chance in chances.items():
        assert abs(counts[token] - 4096 * chance) < 5 * np.sqrt(4096 * chance * (1 - chance))
    assert counts.sum() == sum(counts[token] for token in chances)
    logits[[3, 256, 512]] = 5.0
    kept = set(draw(SamplingConfig(temperature=1.0, top_k=2), logits, vocab=vocab).tolist())
    assert kept == {3, 256, 512}


def test_draws_of_many_equals_are_spread_evenly() -> None:
    """Chi-square of 64 cells over a whole vocabulary, whose first times differ in their last bits only."""
    vocab, rows, cells = 49152, 1024, 64
    found = draw(SamplingConfig(temperature=1.0), np.zeros(vocab, np.float32), rows, vocab)
    counts = np.bincount(found // (vocab // cells), minlength=cells)
    statistic = ((counts - rows / cells) ** 2 / (rows / cells)).sum()
    assert abs(statistic - (cells - 1)) < 4 * np.sqrt(2 * (cells - 1))
    assert len(set(found.tolist())) > 0.95 * rows


def test_models_that_nearly_agree_draw_the_same() -> None:
    """Of broad distributions with a distance d, at least (1 - d) / (1 + d) of the time, and never more than 1 - d."""
    rng = np.random.default_rng(5)
    one = rng.normal(0, 1, 400).astype(np.float32)
    two = one + rng.normal(0, 0.3, 400).astype(np.float32)
    config = SamplingConfig(temperature=1.0)
    distance = np.abs(narrow(config, one) - narrow(config, two)).sum() / 2
    assert 0.05 < distance < 0.3
    same = (draw(config, one, vocab=400) == draw(config, two, vocab=400)).mean()
    slack = 4 * np.sqrt(0.25 / 4096)
    assert (1 - distance) / (1 + distance) - slack < same < 1 - distance + slack


def test_a_draw_is_a_function_of_seed_and_step_alone() -> None:
    """Not of the row's place, of what others ask for, or of what the program can do besides."""
    rows = [(SamplingConfig(temperature=2.0, seed=seed), step) for seed in (1, 2) for step in range(40)]
    logits = np.tile(LOGITS, (len(rows), 1))
    extras = make_extras(len(rows), VOCAB)
    found = choose_fully(rows, logits, extras).token.tolist()
    assert found[:40] == draw(rows[0][0], rows=40).tolist()
    assert found[:40] != found[40:] and len(set(found[:40])) > 2
    others = [(SamplingConfig(temperature=2.0, top_k=3, min_p=0.1, repetition_penalty=2.0), 7), *rows[::-1]]
    logits = np.vstack([LOGITS[::-1], logits])
    assert choose_fully(others, logits, make_extras(len(others), VOCAB)).token.tolist()[1:] == found[::-1]


def test_a_penalty_is_for_tokens_that_were_seen() -> None:
    """As in transformers: positive logits are divided, negative ones multiplied."""
    logits = np.tile(np.array([3.0, 2.0, -1.0, -2.5], np.float32), (4, 1))
    extras = make_extras(4, 4)
    extras.seen[:, 0] = True  # type: ignore[index]
    extras.seen[2, 1] = True  # type: ignore[index]
    extras.seen[3] = True  # type: ignore[index]
    penalties = [1.4, 1.6, 1.6, 1.6]
    rows = [(SamplingConfig(repetition_penalty=penalty), 0) for penalty in penalties]
    assert choose_fully(rows, logits, extras, vocab=4).token.tolist() == [0, 1, 0, 0]
    # A draw sees the changed logits: what is left of a token is what the penalty leaves.
    rows = [(SamplingConfig(repetition_penalty=1000.0, temperature=1.0, top_k=1, seed=seed), 0) for seed in range(4)]
    extras.seen[:] = [True, True, False, True]  # type: ignore[index]
    assert choose_fully(rows, np.abs(logits), extras, vocab=4).token.tolist() == [2] * 4


def test_only_what_is_allowed_is_chosen() -> None:
    """Greedily and by draws; bits of a word, and a second word."""
    vocab = 40
    rng = np.random.default_rng(0)
    logits, allowed = rng.normal(0, 3, (200, vocab)).astype(np.float32), rng.random((200, vocab)) < 0.1
    allowed[:, 39] |= ~allowed.any(axis=1)
    extras = make_extras(200, vocab)
    padded = np.pad(allowed, ((0, 0), (0, 24)))
    extras.allowed[:] = np.packbits(padded, axis=1, bitorder="little").view(np.uint32)  # type: ignore[index]
    rows = [(SamplingConfig(temperature=2.0 * (row % 2), seed=row), 0) for row in range(200)]
    found = choose_fully(rows, logits, extras, vocab).token
    assert allowed[np.arange(200), found].all()
    likeliest = np.where(allowed, logits, -np.inf).argmax(axis=1)
    assert (found == likeliest)[::2].all() and not (found == likeliest)[1::2].all()


def test_probabilities_are_the_models_own() -> None:
    """Before penalty, temperature and mask; likeliest first, and as many as there are tokens."""
    extras = make_extras(1, VOCAB)
    extras.allowed[:] = 1 << 5  # type: ignore[index]
    extras.seen[:] = True  # type: ignore[index]
    rows = [(SamplingConfig(temperature=0.3, repetition_penalty=3.0), 0)]
    silent = choose_fully(rows, LOGITS[None], extras)
    assert silent.token.tolist() == [5] and silent.logprob is not None and not silent.logprob.any()
    extras.probable[...] = True  # type: ignore[index]
    found = choose_fully(rows, LOGITS[None], extras)
    assert found.logprob is not None and found.top_tokens is not None and found.top_logprobs is not None
    expected = np.asarray(jax.nn.log_softmax(LOGITS))
    np.testing.assert_allclose(found.logprob[0], expected[5], rtol=1e-5)
    order = np.argsort(-expected)
    assert found.top_tokens[0].tolist() == [*order.tolist(), *[-1] * (20 - VOCAB)]
    np.testing.assert_allclose(found.top_logprobs[0, :VOCAB], expected[order], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"temperature": 1e-39}, "temperature=1e-39 must be 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be positive"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf must be positive"),
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
