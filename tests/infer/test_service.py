"""The service over a tiny model: mixed requests at a time, who may come, who leaves, what a defect leaves behind."""

import dataclasses
import threading
import time
import types
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export import GraphConfig
from hsai.formats.activations import Activations, take_activations
from hsai.infer import Busy, Closed, Engine, Event, Regex, Request, SamplingConfig, Service, Ticket
from hsai.infer.choose import Extras, Kind
from hsai.infer.programs import Rows
from hsai.infer.runtime import TracedRuntime
from hsai.infer.scheduler import KINDS
from hsai.models import CacheFormat
from tests.export.tiny_models import make_model

DRAWN = SamplingConfig(temperature=1.2, top_p=0.95, seed=7)


def make_engine(
    tokenizer: Tokenizer, cache: CacheFormat = "activations", name: str = "int4", activations: Activations = "float"
) -> Engine:
    """Of a packed model, with a context of 48 in pages of 8.

    Prompts are read by eights: where others had chosen the size of a chunk, a last bit might differ.
    """
    model = take_activations(make_model(name), activations)
    return Engine(TracedRuntime(model, GraphConfig(prefill_buckets=(8,), cache=cache), page=8), tokenizer)


@pytest.fixture(scope="module")
def paged(tokenizer: Tokenizer) -> Engine:
    return make_engine(tokenizer)


@pytest.fixture(scope="module", params=get_args(CacheFormat))
def stored(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Engine:
    """One for each format of a page."""
    return make_engine(tokenizer, request.param)


def serve(engine: Engine, *, tokens: int = 4 * 48, **options: int) -> Service:
    """A service with as much cache as all others here, so that they share programs."""
    return Service(engine, tokens=tokens, **options)


@pytest.fixture
def service(paged: Engine) -> Iterator[Service]:
    """Of four rows and eight waiting requests, which must end with the test."""
    service = serve(paged, rows=4, queue=8)
    yield service
    service.drain(0)
    assert service.stats().pages_used == 0


def gather(ticket: Ticket) -> tuple[Event, tuple[int, ...], str]:
    """The last event, all tokens, and the text."""
    events = list(ticket)
    return (
        events[-1],
        tuple(token for event in events for token in event.tokens),
        "".join(event.text for event in events),
    )


def make_requests(count: int, kind: Kind = "full") -> list[Request]:
    """Prompts that begin alike and end differently, each asked in its own way, up to what `kind` has."""
    rng = np.random.default_rng(count)
    common = rng.integers(1, 280, 17).tolist()
    asked = []
    for index in range(count):
        own = rng.integers(1, 280, rng.integers(1, 14)).tolist()
        kinds = KINDS[: 1 + KINDS.index(kind)]
        mine = kinds[-1 - index % len(kinds)]
        drawn = mine == "drawn" or index % 4 == 0 and mine == "full"
        sampling = SamplingConfig(temperature=1.0, seed=index, top_k=50) if drawn else SamplingConfig()
        if mine == "full" and index % 2:
            sampling = dataclasses.replace(sampling, repetition_penalty=1.3)
        asked.append(
            Request(
                tokens=(*common, *own) if index % 2 else tuple(own),
                max_tokens=4 + index % 9,
                sampling=sampling,
                logprobs=index % 4 if mine == "full" else None,
            )
        )
    return asked


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_the_same_alone_and_among_others(kind: Kind, paged: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed products of integers give a row the same bits in any company of up to eight, on every processor; and a
    program that has more gives it the same token."""
    check_company(paged, kind, monkeypatch)


@pytest.mark.parametrize("name", ["int4", "nm_int4", "vnm_int4"])
def test_with_rounded_activations_too(name: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    check_company(make_engine(tokenizer, name=name, activations="int8"), "full", monkeypatch)


def test_among_sixteen_rows_too(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where activations have 8 bits, products are of integers for any number of rows, on every processor."""
    check_company(make_engine(tokenizer, activations="int8"), "drawn", monkeypatch, rows=16, cached=16 * 48)


def check_company(
    paged: Engine, kind: Kind, monkeypatch: pytest.MonkeyPatch, *, rows: int = 8, cached: int = 4 * 48
) -> None:
    """More than twice as many requests as rows, some coming while others are written: each as it was alone."""
    count = 2 * rows + 2
    requests = make_requests(count, kind)
    alone = [gather(serve(paged, rows=1, tokens=cached).submit(request)) for request in requests]
    write, blocks = paged.runtime.write, set()

    def watch(rows: Rows, extras: Extras | None, steps: int, kind: Kind, *others: Any) -> Any:
        blocks.add((len(rows.tokens), kind))
        return write(rows, extras, steps, kind, *others)

    monkeypatch.setattr(paged.runtime, "write", watch)
    service = serve(paged, rows=rows, tokens=cached, queue=count)
    tickets = [service.submit(request) for request in requests[:-4]]
    while service.stats().queued > 2:
        time.sleep(0.01)
    tickets += [service.submit(request) for request in requests[-4:]]
    together = [gather(ticket) for ticket in tickets]
    assert (rows, kind) in blocks and service.drain(60)
    for request, (last, tokens, text), (ended, found, found_text) in zip(requests, alone, together, strict=True):
        assert (found, found_text, ended.finish_reason) == (tokens, text, last.finish_reason)
        assert last.finish_reason in ("max_tokens", "end_of_text") and len(tokens) <= request.max_tokens
        assert last.usage is not None and last.usage.new_tokens == len(tokens)
        assert text == paged.tokenizer.decode(tokens)
    stats = service.stats()
    assert sum(stats.finished.values()) == count and stats.finished["failed"] == 0
    assert stats.prompt_tokens == sum(len(request.tokens) for request in requests)
    assert stats.new_tokens == sum(len(tokens) for _, tokens, _ in together)
    assert 0 < stats.cached_tokens < stats.prompt_tokens and stats.pages_reusable > 0


def test_a_repeated_prompt_is_found_in_the_cache(stored: Engine) -> None:
    service = Service(stored, rows=2, tokens=48)
    request = Request(tokens=tuple(range(1, 36)), max_tokens=5, sampling=DRAWN)
    first, second = (gather(service.submit(request)) for _ in range(2))
    assert first[1:] == second[1:]
    assert [last.usage.cached_tokens for last, _, _ in (first, second) if last.usage] == [0, 32]


def test_who_gives_its_pages_up_gets_the_same_text(stored: Engine) -> None:
    """Two that need ten pages have six: the one that came last reads again what it wrote, in the cache's format."""
    requests = [Request(tokens=tuple(range(at, at + 10)), max_tokens=30, sampling=DRAWN) for at in (1, 101)]
    alone = [gather(Service(stored, rows=2, tokens=48).submit(request)) for request in requests]
    assert [len(tokens) for _, tokens, _ in alone] == [30, 30]
    service = Service(stored, rows=2, tokens=48)
    together = [gather(ticket) for ticket in [service.submit(request) for request in requests]]
    assert [found for _, *found in together] == [wanted for _, *wanted in alone]
    assert service.stats().preempted > 0


def test_who_leaves_is_not_waited_for(service: Service) -> None:
    """Cancelled while it runs or waits: its last event comes at once, and its pages go to others."""
    seen = threading.Event()
    long = Request(tokens=(5,), max_tokens=40, constraint=Regex("(ab|ba){99}"))  # a token at a time
    first = service.submit(long, on_event=lambda event: seen.set())
    others = [service.submit(long) for _ in range(5)]
    assert seen.wait(60)
    for ticket in (first, *others):
        ticket.cancel()
    for ticket in others:
        last, tokens, _ = gather(ticket)
        assert last.finish_reason == "cancelled" and len(tokens) < 40
    assert service.drain(60)
    assert service.stats().finished["cancelled"] == 6 and service.stats().pages_used == 0


def test_a_full_queue_takes_nobody(paged: Engine) -> None:
    gate = threading.Event()
    service = serve(paged, rows=1, queue=2)
    request = Request(tokens=(5, 6), max_tokens=2, logprobs=0)

    def wait(event: Event) -> None:
        gate.wait(60)

    tickets = [service.submit(request, on_event=wait)]
    while service.stats().running == 0:
        time.sleep(0.01)
    tickets += [service.submit(request) for _ in range(2)]
    with pytest.raises(Busy, match="2 requests are waiting, as many as may") as caught:
        service.submit(request)
    assert 1 <= caught.value.retry_after <= 60
    with pytest.raises(Busy):
        service.check_room()
    gate.set()
    assert [gather(ticket)[0].finish_reason for ticket in tickets[1:]] == ["max_tokens"] * 2
    assert service.stats().rejected == 2 and service.stats().queued == 0
    service.check_room()
    assert service.drain(60)
    with pytest.raises(Closed):
        service.check_room()


def test_idleness_does_not_make_requests_shorter(paged: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """When to come again is said by what requests take, however many there were before a service was idle."""
    service = serve(paged, rows=1, queue=1)
    request = Request(tokens=(5, 6), max_tokens=2)

    def rest() -> None:
        with service._changed:
            assert service._changed.wait_for(lambda: service._thread is None, 60)

    for _ in range(4):
        gather(service.submit(request))
        rest()
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("hsai.infer.service.time", clock)
    service._interval = 40.0
    for _ in range(3):
        service.submit(request, on_event=lambda event: now.__setitem__(0, now[0] + 20.0))
        rest()
    assert service.stats().finished["max_tokens"] == 7
    assert 20 <= service._interval <= 40


def test_draining_answers_all_and_takes_nobody(paged: Engine) -> None:
    service = serve(paged, rows=2)
    tickets = [service.submit(request) for request in make_requests(5)]
    assert service.drain()
    assert all(gather(ticket)[0].finish_reason in ("max_tokens", "end_of_text") for ticket in tickets)
    with pytest.raises(Closed, match="closing"):
        service.submit(make_requests(1)[0])
    assert not [thread for thread in threading.enumerate() if thread.name == "hsai-service"]


def test_draining_ends_in_time(paged: Engine) -> None:
    service = serve(paged, rows=1)
    tickets = [service.submit(Request(tokens=(5,), max_tokens=40, constraint=Regex("(ab){99}"))) for _ in range(3)]
    assert not service.drain(0)
    assert [gather(ticket)[0].finish_reason for ticket in tickets].count("cancelled") >= 2


class Panic(BaseException):
    """What a library in Rust raises of itself."""


@pytest.mark.parametrize("defect", [RuntimeError, Panic])
@pytest.mark.parametrize("step", ["prepare_read", "prepare_write", "read", "write"])
def test_a_defect_ends_those_that_run_and_nobody_else(
    step: str, defect: type[BaseException], paged: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve(paged, rows=1)
    # Different prompts, whose beginnings lie in no page of the other's.
    request, other = (dataclasses.replace(make_requests(1)[0], tokens=tuple(range(at, at + 20))) for at in (5, 50))
    wanted = gather(service.submit(request))[1]
    works, fails = getattr(paged.runtime, step), [True]

    def fail_once(*arguments: object) -> object:
        if fails.pop() if fails else False:
            raise defect("broken on purpose")
        return works(*arguments)

    monkeypatch.setattr(paged.runtime, step, fail_once)
    tickets = [service.submit(asked) for asked in (other, request)]
    first, second = (gather(ticket) for ticket in tickets)
    assert first[0].finish_reason == "failed" and first[1] == ()
    assert second[0].finish_reason == "max_tokens" and second[1] == wanted
    assert service.drain(60)
    stats = service.stats()
    assert service.healthy and stats.finished["failed"] == 1 and stats.finished["max_tokens"] == 2


def test_what_cannot_be_compiled_ends_its_own_request(paged: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is being answered meanwhile goes on, and whoever asks is told of the defect until tokens are made."""
    service = serve(paged, rows=2)
    request = dataclasses.replace(make_requests(1)[0], max_tokens=20)
    wanted = gather(service.submit(request))[1]
    prepare, failed, healthy = paged.runtime.prepare_read, threading.Event(), []

    def fail_for_one(*arguments: Any) -> object:
        if threading.current_thread().name == "hsai-service" and begun.is_set() and not failed.is_set():
            failed.set()
            raise RuntimeError("broken on purpose")
        return prepare(*arguments)

    begun = threading.Event()

    def watch(event: Event) -> None:
        if event.finish_reason is None and not begun.is_set():
            begun.set()
            tickets.append(service.submit(dataclasses.replace(request, tokens=tuple(range(60, 80)))))
        found.extend(event.tokens)
        healthy.append(service.healthy)

    tickets: list[Ticket] = []
    found: list[int] = []
    monkeypatch.setattr(paged.runtime, "prepare_read", fail_for_one)
    service.submit(request, on_event=watch)
    assert begun.wait(60)
    assert gather(tickets[0])[0].finish_reason == "failed"
    assert service.drain(60) and tuple(found) == wanted
    assert failed.is_set() and service.healthy and service.stats().finished["failed"] == 1


def test_a_thread_that_cannot_start_loses_nobody_else(paged: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    service = serve(paged, rows=1)
    request = make_requests(1)[0]

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            service.submit(request)
    assert gather(service.submit(request))[0].finish_reason == "max_tokens"
    assert service.drain(60) and sum(service.stats().finished.values()) == 1


def test_a_client_that_breaks_harms_nobody(service: Service) -> None:
    def break_down(event: Event) -> None:
        raise ZeroDivisionError

    request = make_requests(1)[0]
    service.submit(request, on_event=break_down)
    assert gather(service.submit(request))[0].finish_reason == "max_tokens"
    assert service.drain(60)
    assert service.stats().finished["failed"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows=0 must be between 1 and 64"),
        ({"queue": 0}, "queue=0 must be at least 1"),
        ({"tokens": 47}, "a cache of 47 tokens does not hold the context of 48"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, int], message: str, paged: Engine) -> None:
    with pytest.raises(InputError, match=message):
        Service(paged, **options)  # type: ignore[arg-type]


def test_requests_that_do_not_suit_the_model_are_refused(service: Service) -> None:
    for request, message in (
        (Request(tokens=(280,)), "token id 280 is out of range; valid are 0 to 279"),
        (Request(tokens=(1,) * 49), "the prompt has 49 tokens, and the context holds 48"),
        (Request(tokens=(1,), constraint=Regex("(")), "constraint: the regular expression cannot be used"),
    ):
        with pytest.raises(InputError, match=message):
            service.submit(request)
