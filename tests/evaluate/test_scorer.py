"""Scores against logits of single uncached passes, in all batches and on all meshes."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.errors import InputError
from hsai.evaluate.batches import Pair, pad_length
from hsai.evaluate.scorer import Score, Scorer
from hsai.models import CacheFormat, Transformer
from hsai.sharding import MeshConfig, make_mesh
from tests.export.tiny_models import full_logits

TOLERANCE = 1e-5
"""Nats a token, in float32: sums are added in another order, and nothing else differs."""


TURNED: dict[CacheFormat, float] = {"int8": 5e-3, "int4": 5e-2}
"""Nats a token: sums in another order may turn the rounding of a code, as in tests/infer/test_cache.py."""

ON_MESH = slice(2, 7)
"""Groups of every kind, whose programs are fewer."""


def draw_groups(seed: int) -> list[list[Pair]]:
    """Groups of 1 to 3 pairs that share a context wholly, in part or not at all, up to beyond the model's context.

    Their padded lengths are few: each is a program to compile.
    """
    draw = np.random.default_rng(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, 512, count).tolist())

    groups = []
    for length in (6, 7, 8):
        context = tokens(length)
        groups.append([Pair(context=context, continuation=tokens(count)) for count in (1, 4, 3)])
    context = tokens(6)
    groups.append([Pair(context=context + tokens(count), continuation=tokens(2)) for count in (1, 2, 1)])
    groups.append([])
    groups.append([Pair(context=tokens(60), continuation=tokens(3)), Pair(context=tokens(1), continuation=tokens(48))])
    context = tokens(60)
    groups.append([Pair(context=context, continuation=tokens(2)) for _ in range(3)])  # cut, and cut alike
    groups += [[Pair(context=tokens(1 + count), continuation=tokens(2))] for count in range(4)]
    return groups


def score_plainly(model: Transformer, pair: Pair) -> tuple[np.ndarray, bool]:
    """log p of each token of the continuation, in float64 from full logits, and whether all are the largest."""
    limit = model.config.max_length
    tokens = np.array((pair.context + pair.continuation)[-(limit + 1) :])
    logits = full_logits(model, tokens[:-1]).astype(np.float64)[-len(pair.continuation) :]
    targets = np.array(pair.continuation)
    picked = logits[np.arange(len(targets)), targets] - np.log(np.exp(logits).sum(axis=1))
    return picked, bool((logits.argmax(axis=1) == targets).all())


def greedy_pair(model: Transformer, context: Sequence[int], length: int) -> Pair:
    """A continuation that is the model's own."""
    tokens = list(context)
    for _ in range(length):
        tokens.append(int(full_logits(model, np.array(tokens))[-1].argmax()))
    return Pair(context=tuple(context), continuation=tuple(tokens[len(context) :]))


def test_against_full_logits(model: Transformer) -> None:
    own = greedy_pair(model, (3, 1, 4, 1, 5, 9), 4)
    nearly = Pair(context=own.context, continuation=(*own.continuation[:-1], (own.continuation[-1] + 1) % 512))
    groups = [*draw_groups(0), [own, nearly, nearly]]
    scores = Scorer(model, batch_tokens=128).score(groups)
    assert [len(group) for group in scores] == [len(group) for group in groups]
    assert [score.is_greedy for score in scores[-1]] == [True, False, False]
    for pair, score in zip(sum(groups, []), sum(scores, []), strict=True):
        expected, greedy = score_plainly(model, pair)
        np.testing.assert_allclose(score.token_log_likelihoods, expected, atol=TOLERANCE, rtol=0)
        assert score.is_greedy == greedy
        assert score.log_likelihood == pytest.approx(expected.sum(), abs=TOLERANCE * len(expected))


@pytest.fixture(scope="module")
def scores(model: Transformer) -> list[list[Score]]:
    """Of one device, in batches of a few groups."""
    return Scorer(model, batch_tokens=64).score(draw_groups(1))


@pytest.mark.parametrize("batch_tokens", [1, 5000])
def test_batches_change_nothing(model: Transformer, scores: list[list[Score]], batch_tokens: int) -> None:
    check_same(scores, Scorer(model, batch_tokens=batch_tokens))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_meshes_change_nothing(model: Transformer, scores: list[list[Score]], sizes: tuple[int, int, int]) -> None:
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], model=sizes[2]))
    check_same(scores, Scorer(model, batch_tokens=512, mesh=mesh), ON_MESH)


def check_same(scores: list[list[Score]], other: Scorer, part: slice = slice(None)) -> None:
    """The other scorer gives the same numbers, and the same choice in every group."""
    for left, right in zip(scores[part], other.score(draw_groups(1)[part]), strict=True):
        for a, b in zip(left, right, strict=True):
            np.testing.assert_allclose(a.token_log_likelihoods, b.token_log_likelihoods, atol=TOLERANCE, rtol=0)
            assert a.is_greedy == b.is_greedy
        if left:
            choices = [max(range(len(group)), key=lambda i: group[i].log_likelihood) for group in (left, right)]
            assert choices[0] == choices[1]


@pytest.mark.parametrize("cache", TURNED)
def test_a_narrow_cache_is_what_every_query_reads(model: Transformer, cache: CacheFormat) -> None:
    """Whole texts, prefixes and what follows them, and on a mesh: as decoding token by token through such a cache."""
    groups = draw_groups(1)[2:5]
    mesh = None if cache == "int8" else make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    found = Scorer(model, batch_tokens=512, mesh=mesh, cache=cache).score(groups)
    step = jax.jit(lambda model, token, state: model(token, cache=state))
    moved = 0.0
    for pair, score in zip(sum(groups, []), sum(found, []), strict=True):
        tokens = np.array(pair.context + pair.continuation, np.int32)
        state, rows = model.make_cache(1, model.config.max_length, cache), []
        for token in tokens[:-1]:
            hidden, state = step(model, token[None, None], state)
            rows.append(hidden[0, 0])
        logits = np.asarray(model.logits(jnp.stack(rows)[None])[0], np.float64)[-len(pair.continuation) :]
        picked = logits[np.arange(len(logits)), list(pair.continuation)] - np.log(np.exp(logits).sum(axis=1))
        np.testing.assert_allclose(score.token_log_likelihoods, picked, atol=TURNED[cache], rtol=0)
        moved = max(moved, np.abs(score_plainly(model, pair)[0] - picked).max())
    assert moved > 2 * TURNED[cache]


def test_shared_prefixes_are_computed_once(model: Transformer) -> None:
    """Work follows what differs: five answers to one question cost little more than one."""
    scorer = Scorer(model)
    done: list[tuple[int, int]] = []
    context = tuple(range(1, 31))
    pairs = [Pair(context=context, continuation=(40 + i, 7)) for i in range(5)]
    scorer.score([pairs], lambda *report: done.append(report))
    assert done == [(29 + 5 * 2, 29 + 5 * 2)]  # the context but for its last token once, then that and one more, each


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair(context=(512,), continuation=(1,)), "token id 512 is out of range; valid are 0 to 511"),
        (Pair(context=(1,), continuation=(-1, 3)), "token id -1 is out of range; valid are 0 to 511"),
        (Pair(context=(1,), continuation=(1,) * 49), "a continuation of 49 tokens exceeds the model's context of 48"),
    ],
)
def test_refused(model: Transformer, pair: Pair, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Scorer(model).score([[pair]])


def test_empty_parts_are_refused(model: Transformer) -> None:
    for pair in (Pair(context=(), continuation=(1,)), Pair(context=(1,), continuation=())):
        with pytest.raises(ValueError, match="needs a context and a continuation"):
            Scorer(model).score([[pair]])
    with pytest.raises(InputError, match="batch_tokens=0"):
        Scorer(model, batch_tokens=0)
    with pytest.raises(InputError, match="cache='int3' is unknown; valid are activations, bfloat16, int8, int4"):
        Scorer(model, cache="int3")  # type: ignore[arg-type]


def test_padding_is_short() -> None:
    assert pad_length(0) == 0
    for length in range(1, 5000):
        padded = pad_length(length)
        assert length <= padded <= max(length + 3, 1.25 * length)
    assert len({pad_length(length) for length in range(8193)}) < 45
