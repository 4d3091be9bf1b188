"""The service over a tiny model: mixed requests at a time, who may come, who leaves, what a defect leaves behind."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export import GraphConfig
from hsai.infer import Busy, Closed, Engine, Event, Regex, Request, SamplingConfig, Service, Ticket
from hsai.infer.runtime import TracedRuntime
from tests.export.tiny_models import make_model

DRAWN = SamplingConfig(temperature=1.2, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def paged(tokenizer: Tokenizer) -> Engine:
    """Of a packed model, with a context of 48 in pages of 8."""
    graphs = GraphConfig(prefill_buckets=(4, 16))
    return Engine(TracedRuntime(make_model("int8"), graphs, page=8), tokenizer)


@pytest.fixture
def service(paged: Engine) -> Iterator[Service]:
    """Of four rows and eight waiting requests, which must end with the test."""
    service = Service(paged, rows=4, queue=8)
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


def make_requests(count: int) -> list[Request]:
    """Prompts that begin alike and end differently, each asked in its own way."""
    rng = np.random.default_rng(count)
    common = rng.integers(1, 280, 17).tolist()
    asked = []
    for index in range(count):
        own = rng.integers(1, 280, rng.integers(1, 14)).tolist()
        sampling = SamplingConfig() if index % 3 == 0 else SamplingConfig(temperature=1.0, seed=index, top_k=50)
        if index % 4 == 1:
            sampling = SamplingConfig(temperature=1.0, seed=index, repetition_penalty=1.3)
        tokens = (*common, *own) if index % 2 else tuple(own)
        # All want probabilities: few programs are compiled then, and the largest.
        asked.append(Request(tokens=tokens, max_tokens=4 + index % 9, sampling=sampling, logprobs=index % 4))
    return asked


def test_a_text_is_the_same_alone_and_among_others(paged: Engine, service: Service) -> None:
    """Packed products of integers give a row the same bits in any company; what is left are float sums."""
    requests = make_requests(12)
    alone = [gather(Service(paged, rows=1).submit(request)) for request in requests[:4]]
    tickets = [service.submit(request) for request in requests[:8]]
    while service.stats().queued > 2:
        time.sleep(0.01)
    tickets += [service.submit(request) for request in requests[8:]]
    together = [gather(ticket) for ticket in tickets]
    for (last, tokens, text), (_, found, found_text) in zip(alone, together, strict=False):
        assert found == tokens and found_text == text
        assert last.usage is not None and last.usage.new_tokens == len(tokens)
    for request, (last, tokens, text) in zip(requests, together, strict=True):
        assert last.finish_reason in ("max_tokens", "end_of_text") and len(tokens) <= request.max_tokens
        assert text == paged.tokenizer.decode(tokens)
    stats = service.stats()
    assert sum(stats.finished.values()) == 12 and stats.finished["failed"] == 0
    assert stats.prompt_tokens == sum(len(request.tokens) for request in requests)
    assert stats.new_tokens == sum(len(tokens) for _, tokens, _ in together)
    assert 0 < stats.cached_tokens < stats.prompt_tokens and stats.pages_reusable > 0


def test_a_repeated_prompt_is_found_in_the_cache(paged: Engine) -> None:
    service = Service(paged, rows=2)
    request = Request(tokens=tuple(range(1, 36)), max_tokens=5, sampling=DRAWN, logprobs=0)
    first, second = (gather(service.submit(request)) for _ in range(2))
    assert first[1:] == second[1:]
    assert [last.usage.cached_tokens for last, _, _ in (first, second) if last.usage] == [0, 32]


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
    service = Service(paged, rows=1, queue=2)
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
    gate.set()
    assert [gather(ticket)[0].finish_reason for ticket in tickets[1:]] == ["max_tokens"] * 2
    assert service.stats().rejected == 1 and service.stats().queued == 0


def test_draining_answers_all_and_takes_nobody(paged: Engine) -> None:
    service = Service(paged, rows=2)
    tickets = [service.submit(request) for request in make_requests(5)]
    assert service.drain()
    assert all(gather(ticket)[0].finish_reason in ("max_tokens", "end_of_text") for ticket in tickets)
    with pytest.raises(Closed, match="closing"):
        service.submit(make_requests(1)[0])
    assert not [thread for thread in threading.enumerate() if thread.name == "hsai-service"]


def test_draining_ends_in_time(paged: Engine) -> None:
    service = Service(paged, rows=1)
    tickets = [service.submit(Request(tokens=(5,), max_tokens=40, constraint=Regex("(ab){99}"))) for _ in range(3)]
    assert not service.drain(0)
    assert [gather(ticket)[0].finish_reason for ticket in tickets].count("cancelled") >= 2


def test_a_defect_ends_those_that_run_and_nobody_else(paged: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(paged, rows=1)
    request = make_requests(1)[0]
    wanted = gather(service.submit(request))[1]
    write, fails = paged.runtime.write, [True]

    def fail_once(*arguments: object) -> object:
        if fails.pop() if fails else False:
            raise RuntimeError("broken on purpose")
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(paged.runtime, "write", fail_once)
    tickets = [service.submit(request) for _ in range(2)]
    first, second = (gather(ticket) for ticket in tickets)
    assert first[0].finish_reason == "failed" and first[1] == ()
    assert second[0].finish_reason == "max_tokens" and second[1] == wanted
    stats = service.stats()
    assert service.healthy and stats.finished["failed"] == 1 and stats.finished["max_tokens"] == 2


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
