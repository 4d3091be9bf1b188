"""A service that answers by a script, and a server around any service: what is tested is what lies between."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from hsai.infer import Engine
from hsai.infer.defaults import GenerationDefaults
from hsai.infer.request import Event, Request, TokenLogprob, Usage
from hsai.infer.service import OnEvent, Stats, Ticket
from hsai.serve.app import make_app
from hsai.serve.served import Limits, Served
from hsai.serve.server import HttpServer, listen, name_address

Script = Callable[[Ticket], Iterator[Event]]

MODEL = "tiny"


def make_usage(request: Request, new_tokens: int = 3) -> Usage:
    return Usage(
        prompt_tokens=len(request.tokens),
        cached_tokens=1,
        new_tokens=new_tokens,
        steps=max(new_tokens - 1, 0),
        seconds_queued=0.5,
        seconds_prefill=0.25,
        seconds_decode=0.02,
    )


def speak(*pieces: str, pause: float = 0.0, reason: str = "end_of_text") -> Script:
    """A text in pieces, one token each; ends early when it is cancelled."""

    def script(ticket: Ticket) -> Iterator[Event]:
        made = 0
        for index, piece in enumerate(pieces):
            if ticket.cancelled:
                yield Event(finish_reason="cancelled", usage=make_usage(ticket.request, made))
                return
            made += 1
            wanted = ticket.request.logprobs
            top = tuple((10 + rank, -0.5 - rank) for rank in range(wanted or 0))
            found = () if wanted is None else (TokenLogprob(10 + index, -0.25, top),)
            yield Event(text=piece, tokens=(10 + index,), logprobs=found)
            time.sleep(pause)
        yield Event(finish_reason=reason, usage=make_usage(ticket.request, made))  # type: ignore[arg-type]

    return script


def fail(ticket: Ticket) -> Iterator[Event]:
    """A word, and then a defect."""
    yield Event(text="so far ", tokens=(1,))
    yield Event(finish_reason="failed", usage=make_usage(ticket.request, 1))


def wait_for_cancel(ticket: Ticket) -> Iterator[Event]:
    """Says one word, and then nothing until it is cancelled."""
    yield Event(text="once", tokens=(1,))
    while not ticket.cancelled:
        time.sleep(0.005)
    yield Event(finish_reason="cancelled", usage=make_usage(ticket.request, 1))


class ScriptedService:
    """As `hsai.infer.service.Service`, to those who serve it."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self.tickets: list[Ticket] = []
        self.reset()

    def reset(self) -> None:
        """As at the beginning, once all that runs has ended."""
        self._end()
        self.script = speak("Hello", ", ", "world")
        self.refusal: Exception | None = None
        self.healthy = True
        self.tickets, self._threads = [], []
        self.ended: dict[str, int] = {}
        self.drained: list[float | None] = []

    def check_room(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    def submit(self, request: Request, *, on_event: OnEvent | None = None) -> Ticket:
        if self.refusal is not None:
            raise self.refusal
        ticket = Ticket(request, on_event)
        self.tickets.append(ticket)
        thread = threading.Thread(target=self._play, args=(ticket,))
        self._threads.append(thread)
        thread.start()
        return ticket

    def drain(self, timeout: float | None = None) -> bool:
        self.drained.append(timeout)
        deadline = time.monotonic() + (timeout or 0.0)
        while self.stats().running and time.monotonic() < deadline:
            time.sleep(0.01)
        self._end()
        return True

    def _end(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()
        for thread in self._threads:
            thread.join(timeout=30)

    def stats(self) -> Stats:
        return Stats(
            queued=2,
            running=sum(thread.is_alive() for thread in self._threads),
            pages_total=10,
            pages_used=3,
            pages_reusable=5,
            prompt_tokens=100,
            cached_tokens=40,
            new_tokens=50,
            drafted_tokens=30,
            accepted_tokens=20,
            finished=dict(self.ended),  # type: ignore[arg-type]
            rejected=7,
            preempted=1,
        )

    def _play(self, ticket: Ticket) -> None:
        for event in self.script(ticket):
            if event.finish_reason is not None:
                self.ended[event.finish_reason] = self.ended.get(event.finish_reason, 0) + 1
            ticket.give(event)


class RunningServer:
    """A server in a thread, and a client of it; as a context manager."""

    def __init__(
        self,
        engine: Engine,
        service: Any,
        *,
        limits: Limits | None = None,
        api_key: str | None = None,
        defaults: GenerationDefaults | None = None,
    ) -> None:
        served = Served(
            name=MODEL, engine=engine, service=service, defaults=defaults or GenerationDefaults(), created=1234567890
        )
        self.engine = engine
        self.service = service
        self._listener = listen("127.0.0.1", 0)
        self.url = name_address(self._listener)
        self.port: int = self._listener.getsockname()[1]
        ready = threading.Event()
        self.http = HttpServer(make_app(served, limits or Limits(), api_key=api_key), 1.0, ready.set)
        self._thread = threading.Thread(target=lambda: asyncio.run(self.http.serve([self._listener])))
        self._thread.start()
        assert ready.wait(30)
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()
        self.http.should_exit = True
        self.service.drain(0.0)
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()

    def complete(self, **body: Any) -> httpx.Response:
        """POSTs to /v1/completions."""
        return self.client.post("/v1/completions", json={"model": MODEL, "prompt": "x", **body})

    def chat(self, **body: Any) -> httpx.Response:
        """POSTs to /v1/chat/completions."""
        messages = [{"role": "user", "content": "x"}]
        return self.client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages, **body})

    def post(self, body: bytes, **headers: str) -> httpx.Response:
        """POSTs bytes as they are."""
        return self.client.post(
            "/v1/completions", content=body, headers={"content-type": "application/json", **headers}
        )

    def metrics(self) -> dict[str, float]:
        """Every sample by its name and labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}


def eventually(condition: Callable[[], Any]) -> None:
    """Waits for what another thread does."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refusal(response: httpx.Response) -> dict[str, Any]:
    """The error object of a response, which has nothing else, with the status."""
    content = response.json()
    assert list(content) == ["error"] and set(content["error"]) == {"message", "type", "param", "code"}, content
    assert response.headers["content-type"] == "application/json"
    assert "\n" not in content["error"]["message"]
    return {"status": response.status_code, **content["error"]}
