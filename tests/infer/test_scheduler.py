"""The scheduler over a model of plain Python (plain_model.py): whatever comes, each gets its own text."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.infer import Event, Request, SamplingConfig, scheduler
from hsai.infer.programs import Vocabulary
from hsai.infer.row import Row
from hsai.infer.scheduler import Scheduler
from tests.infer.plain_model import PAGE, SIZE, SLOTS, PlainRuntime, PlainSpeculator, continue_text


@dataclasses.dataclass
class Client:
    """Somebody who asks at some time, may leave later, and keeps what was answered."""

    request: Request
    comes: int = 0
    leaves: int = 10**9
    turn: int = 0
    events: list[Event] = dataclasses.field(default_factory=list)

    def make_row(self, tokenizer: Tokenizer) -> Row:
        return Row(self.request, tokenizer, SLOTS, None, self.events.append, lambda: self.turn >= self.leaves)

    def check(self) -> None:
        """One last event, and the tokens that the model makes of this prompt, or the first of them."""
        assert [event.finish_reason is not None for event in self.events] == [False] * (len(self.events) - 1) + [True]
        last = self.events[-1]
        assert last.usage is not None
        new = tuple(token for event in self.events for token in event.tokens)
        wanted, reason = continue_text(self.request.tokens, self.request.max_tokens)
        assert last.usage.new_tokens == len(new)
        if last.finish_reason == "cancelled":
            assert self.turn >= self.leaves and new == wanted[: len(new)]
        else:
            assert (new, last.finish_reason) == (wanted, reason)


def make_scheduler(runtime: PlainRuntime, **options: Any) -> Scheduler:
    return Scheduler(runtime, Vocabulary(SIZE, frozenset({0})), **options)


def turn_until_idle(served: Scheduler, clients: list[Client]) -> Iterator[None]:
    """Each turn; fails if they do not come to an end."""
    for _ in range(5000):
        if served.idle:
            return
        for client in clients:
            client.turn += 1
        served.turn()
        pages = [page for row in served.running for page in row.pages]
        assert served.pool.held == len(set(pages))
        yield
    raise AssertionError("some requests wait for ever")


requests = st.builds(
    Request,
    tokens=st.lists(st.integers(1, 3), min_size=1, max_size=SLOTS).map(tuple),
    max_tokens=st.integers(1, 60),
    sampling=st.just(SamplingConfig()) | st.just(SamplingConfig(repetition_penalty=2.0)),  # which nobody drafts for
)
speculators = st.none() | st.builds(PlainSpeculator, st.booleans())
clients = st.builds(
    Client,
    request=requests,
    comes=st.just(0) | st.integers(1, 12),
    leaves=st.just(10**9) | st.integers(1, 24),
)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    asked=st.lists(clients, min_size=1, max_size=12),
    rows=st.integers(1, 6),
    spare=st.integers(0, 3),
    hurried=st.booleans(),
    speculator=speculators,
)
def test_whatever_comes_each_gets_its_own_text(
    asked: list[Client],
    rows: int,
    spare: int,
    hurried: bool,
    speculator: PlainSpeculator | None,
    tokenizer: Tokenizer,
) -> None:
    """With pages for little more than one row, so that rows are set back; patient or not, with drafts or without.

    They come and leave between turns and within, as soon as something was read or written.
    """

    def meanwhile() -> None:
        for client in asked:
            client.turn += 1
            if client.turn == client.comes:
                served.waiting.append(client.make_row(tokenizer))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "PATIENCE", 0.0 if hurried else 1e9)
        options = {"rows": rows, "tokens": SLOTS + spare * PAGE, "speculator": speculator}
        served = make_scheduler(PlainRuntime(meanwhile), **options)
        for client in asked:
            client.turn, client.events = 0, []
        served.waiting.extend(client.make_row(tokenizer) for client in asked if client.comes == 0)
        for _ in turn_until_idle(served, []):
            meanwhile()
        for client in asked:
            if client.turn < client.comes:  # all others have gone
                client.turn = client.comes
                served.waiting.append(client.make_row(tokenizer))
        for _ in turn_until_idle(served, asked):
            pass
    for client in asked:
        client.check()
    assert served.pool.available == served.pool.count
    assert sum(served.finished.values()) == len(asked)


def ask(served: Scheduler, tokenizer: Tokenizer, *requests: Request) -> list[Client]:
    """Clients whose requests are all answered."""
    clients = [Client(request) for request in requests]
    for client in clients:
        served.waiting.append(client.make_row(tokenizer))
    for _ in turn_until_idle(served, clients):
        pass
    for client in clients:
        client.check()
    return clients


def usage_of(client: Client) -> Any:
    return client.events[-1].usage


def test_what_was_read_is_not_read_again(tokenizer: Tokenizer) -> None:
    """Full pages of a prompt, and of what was made of it; never the prompt's last token."""
    runtime = PlainRuntime()
    served = make_scheduler(runtime, rows=2)
    prompt = tuple(1 + index % 3 for index in range(14))
    (first,) = ask(served, tokenizer, Request(tokens=prompt, max_tokens=6))
    assert runtime.reads == 13 and usage_of(first).cached_tokens == 0
    new = tuple(token for event in first.events for token in event.tokens)
    assert len(new) == 6
    again, other = ask(served, tokenizer, Request(tokens=prompt, max_tokens=6), Request(tokens=(3, *prompt)))
    assert usage_of(again).cached_tokens == 12 and usage_of(other).cached_tokens == 0
    assert runtime.reads == 13 + 1 + 14
    (longer,) = ask(served, tokenizer, Request(tokens=prompt + new, max_tokens=2))
    assert usage_of(longer).cached_tokens == 16  # the 20th token was made, and never read
    assert runtime.reads == 13 + 1 + 14 + 3
    (whole,) = ask(served, tokenizer, Request(tokens=prompt[:12], max_tokens=1))
    assert usage_of(whole).cached_tokens == 8
    assert served.counts["cached_tokens"] == 12 + 16 + 8
    assert served.counts["prompt_tokens"] == 14 + 14 + 15 + 20 + 12


@pytest.mark.parametrize("speculator", [None, PlainSpeculator(True)])
def test_the_youngest_is_set_back_and_comes_next(speculator: PlainSpeculator | None, tokenizer: Tokenizer) -> None:
    """Two rows that grow to the whole cache each: the older one ends first, and the younger one before the third."""
    seeds = [seed for seed in range(1, 60) if continue_text((seed, 1, 1), 37)[1] == "max_tokens"]
    ended: list[int] = []
    runtime = PlainRuntime()
    served = make_scheduler(runtime, rows=2, tokens=SLOTS + PAGE, speculator=speculator)
    asked = [Client(Request(tokens=(seed, 1, 1), max_tokens=37)) for seed in seeds[:3]]
    for client in asked:
        served.waiting.append(client.make_row(tokenizer))
    for _ in turn_until_idle(served, asked):
        done = [index for index, client in enumerate(asked) if client.events and client.events[-1].finish_reason]
        ended += [index for index in done if index not in ended]
    for client in asked:
        client.check()
    assert served.counts["preempted"] >= 1 and ended == [0, 1, 2]
    assert served.counts["prompt_tokens"] == 9


def test_a_short_prompt_does_not_wait_for_a_long_one(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are read in turn; and once somebody writes, each turn reads little, and writes."""
    monkeypatch.setattr(scheduler, "PATIENCE", 0.0)
    runtime = PlainRuntime()
    served = make_scheduler(runtime, rows=3, tokens=4 * SLOTS)
    asked = [Client(Request(tokens=(index,) * size, max_tokens=3)) for index, size in ((1, 40), (2, 39), (3, 6))]
    for client in asked:
        served.waiting.append(client.make_row(tokenizer))
    for _ in asked:
        served.turn()
    assert [len(client.events) for client in asked] == [0, 0, 1]
    assert runtime.reads == 8 + 8 + 5
    reads = [runtime.reads]
    for _ in turn_until_idle(served, asked):
        reads.append(runtime.reads)
    assert reads[:3] == [21, 25, 29]  # the smallest chunk in each turn, while the third writes
    for client in asked:
        client.check()


def test_a_long_prompt_alone_is_looked_up_from(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes while it is read is read in turn with it, and who leaves is not read on."""
    monkeypatch.setattr(scheduler, "PATIENCE", 0.0)
    long, short = Client(Request(tokens=(1,) * 40)), Client(Request(tokens=(2,) * 5, max_tokens=1))

    def meanwhile() -> None:
        if runtime.reads == 8:
            served.waiting.append(short.make_row(tokenizer))
        elif short.events:
            long.leaves = 0

    runtime = PlainRuntime(meanwhile)
    served = make_scheduler(runtime, rows=2, tokens=2 * SLOTS)
    served.waiting.append(long.make_row(tokenizer))
    for _ in turn_until_idle(served, [long, short]):
        pass
    assert long.events[-1].finish_reason == "cancelled" and runtime.reads < 8 + 5 + 16
    long.check()
    short.check()


def test_requests_begin_in_order(tokenizer: Tokenizer) -> None:
    """One that finds no pages is not overtaken by one that would."""
    served = make_scheduler(PlainRuntime(), rows=4, tokens=SLOTS)
    large, short = Request(tokens=(1,) * 30, max_tokens=2), Request(tokens=(2, 2), max_tokens=2)
    asked = [Client(large), Client(dataclasses.replace(large, tokens=(3,) * 30)), Client(short)]
    for client in asked:
        served.waiting.append(client.make_row(tokenizer))
    served.turn()
    assert len(served.running) == 1 and len(served.waiting) == 2
    for _ in turn_until_idle(served, asked):
        pass
    for client in asked:
        client.check()


def test_blocks_grow_with_what_is_known_of_a_step(tokenizer: Tokenizer) -> None:
    """One token first, then as many as patience allows, and no more than anybody may make."""
    seed = next(seed for seed in range(1, 99) if continue_text((seed, 2), 39)[1] == "max_tokens")
    runtime = PlainRuntime()
    ask(make_scheduler(runtime, rows=1), tokenizer, Request(tokens=(seed, 2), max_tokens=39))
    assert [steps for _, steps in runtime.blocks] == [1, 16, 16, 6]


def test_blocks_of_drafts_take_fewer_steps(tokenizer: Tokenizer) -> None:
    """Drafts and those that were accepted are counted; and a text that needs every page still comes to its end."""
    seed = next(seed for seed in range(1, 99) if continue_text((seed, 2), 39)[1] == "max_tokens")
    served = make_scheduler(PlainRuntime(), rows=1, speculator=PlainSpeculator(True))
    (client,) = ask(served, tokenizer, Request(tokens=(seed, 2), max_tokens=39))
    drafted, accepted = served.counts["drafted_tokens"], served.counts["accepted_tokens"]
    assert 10 < accepted < drafted < 3 * 39
    assert (usage_of(client).drafted_tokens, usage_of(client).accepted_tokens) == (drafted, accepted)
    assert usage_of(client).steps == 38 and len(client.events) <= 4


def test_a_page_that_is_found_was_read_by_the_draft_model_too(tokenizer: Tokenizer) -> None:
    """Also where a block ended at its end, with a draft that was accepted and not read, or without any drafts."""
    for seed in range(1, 30):
        served = make_scheduler(PlainRuntime(), rows=1, speculator=PlainSpeculator(True))
        punished = SamplingConfig(repetition_penalty=2.0)
        tokens: tuple[int, ...] = (seed,)
        for sampling in (SamplingConfig(), punished, SamplingConfig()):
            (client,) = ask(served, tokenizer, Request(tokens=tokens, max_tokens=8, sampling=sampling))
            tokens += tuple(token for event in client.events for token in event.tokens)
            assert usage_of(client).cached_tokens == (len(tokens) - usage_of(client).new_tokens - 1) // PAGE * PAGE


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(InputError, match="rows=9 must be between 1 and 8"):
        make_scheduler(PlainRuntime(), rows=9)
    with pytest.raises(InputError, match="a cache of 39 tokens does not hold the context of 40"):
        make_scheduler(PlainRuntime(), rows=1, tokens=39)
