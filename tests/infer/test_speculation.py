"""Speculation: whoever drafts, the text is the one without drafts, and it takes fewer steps."""

import dataclasses
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export import GraphConfig, write_bundle
from hsai.formats.storage import named_weights, replace_weights
from hsai.infer import Engine, Generation, JsonSchema, Request, SamplingConfig, Service
from hsai.infer.choose import Kind
from hsai.infer.programs import MOST_STEPS, Made, Vocabulary
from hsai.infer.runtime import TracedRuntime, make_rows
from hsai.infer.speculation import LONGEST, SHORTEST, look_up
from hsai.infer.speculator import Drafting, TracedSpeculator
from hsai.models import CacheFormat, Transformer
from tests.export.tiny_models import full_logits, make_chatty_tokenizer, make_model
from tests.infer.test_sampling import narrow

PAGE = 8
DRAFTS = 3
DRAWN = SamplingConfig(temperature=0.7, top_k=40, seed=11)
LOOPING = [7, 30, 31, 32, 7, 30, 31, 32, 7]


def make_engine(tokenizer: Tokenizer, drafting: Drafting | None = None, cache: CacheFormat = "activations") -> Engine:
    """Of a packed model, with a context of 48 in pages of 8."""
    graphs = GraphConfig(prefill_buckets=(4, 16), cache=cache)
    runtime = TracedRuntime(make_model("int8"), graphs, page=PAGE)
    return Engine(runtime, tokenizer, None, None if drafting is None else TracedSpeculator(runtime, drafting))


def make_relative(name: str) -> Transformer:
    """The model with other gains at its end, so that one program serves all: itself, a cousin, or a stranger."""
    model = make_model("int8")
    gain = named_weights(model)["final_norm.gain"].get_value()
    draws = np.random.default_rng(1).uniform(-1, 1, gain.shape).astype(np.float32)
    gains = {"itself": gain, "cousin": gain * (1 + 0.5 * draws), "stranger": draws}
    return replace_weights(model, {"final_norm.gain": gains[name]})


DRAFTINGS = {"lookup": Drafting(tokens=DRAFTS)} | {
    name: Drafting(model=make_relative(name), tokens=DRAFTS) for name in ("itself", "cousin", "stranger")
}


@pytest.fixture(scope="module")
def plain(tokenizer: Tokenizer) -> Engine:
    return make_engine(tokenizer)


@pytest.fixture(scope="module")
def engines(tokenizer: Tokenizer) -> dict[str, Engine]:
    """One for each of those who draft."""
    return {name: make_engine(tokenizer, drafting) for name, drafting in DRAFTINGS.items()}


def check(found: Generation, wanted: Generation) -> None:
    """The same text, which ended in the same way."""
    assert (found.tokens, found.text, found.finish_reason) == (wanted.tokens, wanted.text, wanted.finish_reason)
    assert found.decode_steps == wanted.decode_steps
    assert 0 <= found.accepted_tokens <= found.drafted_tokens


@pytest.mark.parametrize("sampling", [SamplingConfig(), DRAWN], ids=["greedy", "drawn"])
def test_a_text_is_the_one_without_drafts(sampling: SamplingConfig, plain: Engine, engines: dict[str, Engine]) -> None:
    """Token for token, for several prompts; what the model drafts itself, it accepts, and little of a stranger's."""
    counts = {name: np.zeros(2, int) for name in engines}
    for prompt in ([5], [9, 2, 250], LOOPING, list(range(1, 24))):
        wanted = plain.generate_tokens(prompt, max_tokens=24, sampling=sampling)
        for name, engine in engines.items():
            found = engine.generate_tokens(prompt, max_tokens=24, sampling=sampling)
            check(found, wanted)
            counts[name] += found.drafted_tokens, found.accepted_tokens
    drafted, accepted = counts["itself"]
    # All but those behind a token that ends the text.
    assert drafted - DRAFTS * 4 < accepted <= drafted and accepted > 40
    rates = {name: accepted / drafted for name, (drafted, accepted) in counts.items()}
    assert rates["stranger"] < 0.2 < rates["cousin"] < 0.9
    assert counts["lookup"][0] > 0


def test_no_program_sorts_a_vocabulary(tokenizer: Tokenizer) -> None:
    """That takes longer than a small model takes for a token; XLA makes a sort of `top_k` in some places only."""
    engine = make_engine(tokenizer, DRAFTINGS["lookup"])
    for sampling in (SamplingConfig(), DRAWN):
        engine.generate_tokens(LOOPING, max_tokens=4, sampling=sampling)
        Engine(engine.runtime, tokenizer).generate_tokens(LOOPING, max_tokens=4, sampling=sampling)
    assert isinstance(engine.runtime, TracedRuntime) and isinstance(engine.speculator, TracedSpeculator)
    programs = [*engine.runtime._programs.values(), *engine.speculator._programs.values()]
    texts = [program.as_text() for program in programs]  # type: ignore[attr-defined]  # compiled, all of them
    assert len(texts) >= 5 and not any(" sort(" in text for text in texts)


def test_a_prompt_that_repeats_itself_is_looked_up(plain: Engine, engines: dict[str, Engine]) -> None:
    """A greedy text that has fallen into a loop, as that of this model does."""
    start = plain.generate_tokens([5, 6], max_tokens=40).tokens
    found = engines["lookup"].generate_tokens([5, 6, *start[:24]], max_tokens=16)
    check(found, plain.generate_tokens([5, 6, *start[:24]], max_tokens=16))
    assert found.accepted_tokens >= 6


@pytest.mark.parametrize("name", DRAFTINGS)
def test_texts_end_where_they_must(name: str, plain: Engine, engines: dict[str, Engine]) -> None:
    """With the tokens that were asked for, in the middle of a step or not, and with the context."""
    for most in (1, 2, 3, 4, 5, 7):
        check(engines[name].generate_tokens(LOOPING, max_tokens=most), plain.generate_tokens(LOOPING, max_tokens=most))
    for prompt in (46, 47, 48):
        ids = [7, 30, 31] * 16
        found = engines[name].generate_tokens(ids[:prompt], max_tokens=99)
        check(found, plain.generate_tokens(ids[:prompt], max_tokens=99))
        assert found.finish_reason == "context"


def test_a_stop_string_among_accepted_drafts_ends_the_text(plain: Engine, engines: dict[str, Engine]) -> None:
    whole = plain.generate_tokens(LOOPING, max_tokens=24, sampling=DRAWN)
    pieces = [plain.tokenizer.decode([token]) for token in whole.tokens]
    stop = next(piece for piece in pieces[6:] if piece.strip() and "\ufffd" not in piece)
    for engine in engines.values():
        found = engine.generate_tokens(LOOPING, max_tokens=24, sampling=DRAWN, stop=(stop,))
        check(found, plain.generate_tokens(LOOPING, max_tokens=24, sampling=DRAWN, stop=(stop,)))
        assert found.finish_reason == "stop" and stop not in found.text
        # What was accepted beyond it is forgotten, in the pages as well.
        check(
            engine.generate_tokens([*LOOPING, *found.tokens, 9], max_tokens=8),
            plain.generate_tokens([*LOOPING, *found.tokens, 9], max_tokens=8),
        )


def write(
    engine: Engine, rows: list[tuple[list[int], int, SamplingConfig]], vocabulary: Vocabulary, steps: int, kind: Kind
) -> Made:
    """A block of rows with prompts shorter than a page, each in two pages of its own."""
    speculator, runtime, count = engine.speculator, engine.runtime, 2 * len(rows)
    assert speculator is not None
    pages, draft_pages = runtime.make_pages(count), speculator.make_pages(count)
    history = np.zeros((len(rows), runtime.slots), np.int32)
    for index, (ids, _, _) in enumerate(rows):
        table = np.full((1, runtime.width), count, np.int32)
        table[0, :2] = 2 * index, 2 * index + 1
        history[index, : len(ids)] = ids
        if len(ids) > 1:
            pages = runtime.read(np.array(ids[:-1], np.int32), 0, table, pages)
            if draft_pages is not None:
                draft_pages = speculator.read(np.array(ids[:-1], np.int32), 0, table, draft_pages)
    given = [
        (ids[-1], len(ids) - 1, limit, [2 * index, 2 * index + 1], sampling, 0)
        for index, (ids, limit, sampling) in enumerate(rows)
    ]
    arrays = dataclasses.replace(make_rows(given, len(rows), runtime.width, count), history=history)  # type: ignore[arg-type]
    return speculator.write(arrays, steps, kind, vocabulary, pages, draft_pages)[0]


@pytest.mark.parametrize("end", [2, 5])
def test_a_token_that_ends_the_text_ends_it_among_accepted_drafts(
    end: int, plain: Engine, engines: dict[str, Engine]
) -> None:
    """It is the last one that is made, in the first step or the second."""
    prompt = next(
        ids for token in range(1, 280) if len(set(plain.generate_tokens(ids := [token, 9], max_tokens=6).tokens)) == 6
    )
    whole = plain.generate_tokens(prompt, max_tokens=6).tokens
    stops = frozenset({whole[end]})
    made = write(engines["itself"], [(prompt, 8, SamplingConfig())], Vocabulary(280, stops), 2, "greedy")
    assert made.tokens[: end + 1, 0].tolist() == list(whole[: end + 1])
    assert (made.tokens[end + 1 :] == -1).all() and len(made.tokens) == MOST_STEPS * (1 + DRAFTS)
    steps = 1 + end // (1 + DRAFTS)
    assert made.drafts is not None and made.steps == steps and made.drafts[1].tolist() == [end + 1 - steps]


@pytest.mark.parametrize("name", ["lookup", "cousin"])
def test_drawn_texts_follow_the_models_distribution(name: str, engines: dict[str, Engine]) -> None:
    """Chi-square of a text's second and third token together, against what the model's full forwards say."""
    vocab, most, count = 280, 3, 64
    config = SamplingConfig(temperature=0.8, top_k=most)
    model = make_model("int8")

    def weigh(ids: list[int]) -> np.ndarray:
        return narrow(config, full_logits(model, np.array(ids))[-1, :vocab])

    start = [7, 30]
    if name == "lookup":  # what is found is likely, and not certain
        start = next(ids for x in range(1, 280) if 0.1 < weigh(ids := [7, x, 7, x, 7])[x] < 0.8)
    expected: dict[tuple[int, int], float] = {}
    for one in np.flatnonzero(weigh(start)).tolist():
        for two in np.flatnonzero(weigh([*start, one])).tolist():
            expected[one, two] = weigh(start)[one] * weigh([*start, one])[two]
    found = dict.fromkeys(expected, 0)
    drafts = np.zeros(2, int)
    for block in range(12):
        seeds = range(block * count, (block + 1) * count)
        rows = [(start, 2, dataclasses.replace(config, seed=seed)) for seed in seeds]
        made = write(engines[name], rows, Vocabulary(vocab, frozenset()), 2, "drawn")
        assert made.drafts is not None
        drafts += made.drafts.sum(axis=1)
        for one, two in made.tokens[:2].T.tolist():
            found[one, two] += 1
    total = 12 * count
    cells = sorted(expected, key=lambda pair: -expected[pair])
    # Cells that are rarely met are counted together.
    large = [pair for pair in cells if total * expected[pair] >= 8]
    pairs = [(found[pair], total * expected[pair]) for pair in large]
    pairs.append((total - sum(seen for seen, _ in pairs), total - sum(mean for _, mean in pairs)))
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in pairs if mean > 1e-3)
    freedom = len(pairs) - 1
    assert freedom >= 4 and statistic < freedom + 4 * np.sqrt(2 * freedom)
    assert 0 < drafts[1] < drafts[0] == total  # the law holds for what is accepted and what is not


@pytest.mark.parametrize("cache", ["int8", "int4"])
def test_a_cache_of_integers_forgets_rejected_drafts(cache: CacheFormat, tokenizer: Tokenizer) -> None:
    wanted = make_engine(tokenizer, cache=cache).generate_tokens(LOOPING, max_tokens=20, sampling=DRAWN)
    drafting = make_engine(tokenizer, DRAFTINGS["cousin"], cache)
    found = drafting.generate_tokens(LOOPING, max_tokens=20, sampling=DRAWN)
    check(found, wanted)
    assert 0 < found.accepted_tokens < found.drafted_tokens


def test_a_draft_model_finds_what_it_has_read_before(plain: Engine, engines: dict[str, Engine]) -> None:
    """In the cache, as the model does: of a text with drafts, and of one that was made without."""
    engine = engines["itself"]
    ids = list(range(40, 57))
    first = engine.generate_tokens(ids, max_tokens=9)
    for options in ({}, {"logprobs": 0}):
        again = [*ids, *first.tokens, 3]
        found = engine.generate_tokens(again, max_tokens=9, **options)  # type: ignore[arg-type]
        check(found, plain.generate_tokens(again, max_tokens=9, **options))  # type: ignore[arg-type]
        assert found.cached_tokens >= 24 or options
        assert (found.drafted_tokens == 0) == bool(options)
        ids, first = again, found
    last = engine.generate_tokens([*ids, *first.tokens, 4], max_tokens=5)
    check(last, plain.generate_tokens([*ids, *first.tokens, 4], max_tokens=5))
    assert last.cached_tokens >= 32 and last.accepted_tokens == last.drafted_tokens > 0


def ask(engine: Engine, requests: list[Request], **options: int) -> tuple[list[tuple[Any, ...]], Service]:
    """What each becomes, together: tokens, and why it ended."""
    service = Service(engine, **options)
    tickets = [service.submit(request) for request in requests]
    texts = []
    for ticket in tickets:
        events = list(ticket)
        texts.append((tuple(token for event in events for token in event.tokens), events[-1].finish_reason))
    assert service.drain(60) and service.stats().pages_used == 0
    return texts, service


def test_rows_of_all_kinds_side_by_side(plain: Engine, engines: dict[str, Engine]) -> None:
    """Greedy, drawn, of a penalty, with probabilities, of a schema; each its own text, in any company, with drafts or
    without; and when pages run short."""
    rng = np.random.default_rng(0)
    kinds: list[dict[str, Any]] = [
        {},
        {"sampling": DRAWN},
        {"sampling": SamplingConfig(repetition_penalty=1.3)},
        {"sampling": DRAWN, "logprobs": 2},
        {"constraint": JsonSchema('{"type": "integer"}')},
        {"sampling": SamplingConfig(temperature=1.5, seed=3)},
        {},
    ]
    requests = [
        Request(tokens=tuple(rng.integers(1, 280, 3 + 2 * index).tolist()), max_tokens=14 + index, **kind)
        for index, kind in enumerate(kinds)
    ]
    wanted = [ask(plain, [request], rows=1)[0][0] for request in requests]
    found, service = ask(engines["cousin"], requests, rows=2, tokens=48)
    assert found == wanted
    stats = service.stats()
    assert stats.preempted > 0 and stats.finished["failed"] == 0
    assert 0 < stats.accepted_tokens < stats.drafted_tokens


@hypothesis.given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=3, max_size=3))
def test_lookup_finds_what_plain_python_finds(texts: list[list[int]]) -> None:
    """Behind the texts lies what would be found if it were looked at; and one row is not there."""
    history = np.full((4, 16), 1, np.int32)
    positions = np.array([*(len(text) - 1 for text in texts), -1], np.int32)
    for line, text in zip(history, texts, strict=False):
        line[: len(text)] = text
    found = np.asarray(lookup(history, positions, 5))
    assert found.tolist() == [*(find_again(text, 5) for text in texts), [-1] * 5]


lookup = jax.jit(look_up, static_argnums=2)


def find_again(text: list[int], drafts: int) -> list[int]:
    for size in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                copied = list(text)
                for _ in range(drafts):
                    copied.append(copied[end + len(copied) - len(text)])
                return copied[len(text) :]
    return [-1] * drafts


def test_what_cannot_draft_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    bundles = {name: tmp_path / name for name in ("own", "other", "short")}
    write_bundle(bundles["own"], make_model("int8"), tokenizer)
    write_bundle(bundles["other"], make_model("int8"), make_chatty_tokenizer())
    write_bundle(bundles["short"], make_model("int8", max_length=40), tokenizer)
    with pytest.raises(InputError, match=f"draft model {bundles['other']} has another tokenizer than {bundles['own']}"):
        Engine.load(bundles["own"], speculate=bundles["other"])
    with pytest.raises(InputError, match="the draft model reads 40 tokens at most, and the context is 48"):
        Engine.load(bundles["own"], speculate=bundles["short"])
    assert Engine.load(bundles["own"], speculate=bundles["short"], context=40).speculator is not None
    for tokens in (0, 17):
        with pytest.raises(InputError, match=f"draft_tokens={tokens} must be between 1 and 16"):
            Engine.load(bundles["own"], speculate="lookup", draft_tokens=tokens)
    with pytest.raises(InputError, match="speculate=lookup cannot be chosen with graphs"):
        Engine.load(bundles["own"], speculate="lookup", graphs=True)
