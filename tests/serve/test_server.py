"""From the first signal to the end: what runs is answered, for a while."""

import gc
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from hsai.errors import InputError
from hsai.infer import Engine
from hsai.infer.defaults import GenerationDefaults
from hsai.infer.request import Event
from hsai.infer.service import Ticket
from hsai.serve.app import make_app
from hsai.serve.served import Limits, Served
from hsai.serve.server import listen, name_address, run_server
from tests.serve.scripted import MODEL, ScriptedService, eventually, make_usage, speak, wait_for_cancel

BODY = {"model": MODEL, "prompt": "x"}


def serve(
    engine: Engine, service: ScriptedService, seconds: float, act: Callable[[str], None]
) -> tuple[list[str], float]:
    """Runs a server in this thread while `act` is done in another; what it said, and how long it took to end."""
    served = Served(name=MODEL, engine=engine, service=service, defaults=GenerationDefaults(), created=1)  # type: ignore[arg-type]
    listener = listen("127.0.0.1", 0)
    said: list[str] = []
    stopped: list[float] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            act(name_address(listener))
        except BaseException as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=work)

    def ready() -> None:
        said.append("ready")
        thread.start()

    def stop() -> None:
        said.append("stop")
        stopped.append(time.monotonic())

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        run_server(
            make_app(served, Limits()),
            service,  # type: ignore[arg-type]
            listener,
            drain_seconds=seconds,
            on_ready=ready,
            on_stop=stop,
        )
        lasted = time.monotonic() - stopped[0]
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    thread.join(timeout=30)
    if failures:
        raise failures[0]
    return said, lasted


def last_event(response: httpx.Response) -> Any:
    data = response.read().decode().removesuffix("\n\n").split("\n\n")[-1].removeprefix("data: ")
    return data if data == "[DONE]" else json.loads(data)


def test_what_was_loaded_is_not_looked_through_for_garbage(engine: Engine) -> None:
    """While it serves: all that there was is set apart, and what comes afterwards is collected as if it were alone."""
    frozen: list[int] = []

    def act(url: str) -> None:
        frozen.append(gc.get_freeze_count())
        os.kill(os.getpid(), signal.SIGTERM)

    serve(engine, ScriptedService(), 5.0, act)
    assert frozen[0] > 100_000 and gc.get_freeze_count() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_runs_is_answered(number: signal.Signals, engine: Engine) -> None:
    service = ScriptedService()
    service.script = speak(*"abcdefgh", pause=0.1)

    def act(url: str) -> None:
        with (
            httpx.Client(base_url=url, timeout=30) as idle,
            httpx.stream("POST", f"{url}/v1/completions", json=BODY | {"stream": True}, timeout=30) as response,
        ):
            assert idle.get("/health").is_success
            os.kill(os.getpid(), number)
            eventually(lambda: service.drained)
            with pytest.raises(httpx.TransportError):
                while True:
                    httpx.get(f"{url}/health")
            assert last_event(response) == "[DONE]"
            with pytest.raises(httpx.TransportError):
                idle.get("/health")

    said, lasted = serve(engine, service, 100.0, act)
    assert said == ["ready", "stop"] and lasted < 60
    assert service.ended == {"end_of_text": 1} and service.drained[0] == 100.0


@pytest.mark.parametrize("stream", [True, False])
def test_the_time_for_it_ends(stream: bool, engine: Engine) -> None:
    service = ScriptedService()
    service.script = wait_for_cancel
    found: list[Any] = []

    def act(url: str) -> None:
        threading.Thread(target=stop).start()
        with httpx.stream("POST", f"{url}/v1/completions", json=BODY | {"stream": stream}, timeout=30) as response:
            assert response.status_code == (200 if stream else 503)
            found.append(last_event(response))

    def stop() -> None:
        eventually(lambda: service.tickets)
        os.kill(os.getpid(), signal.SIGTERM)

    _, lasted = serve(engine, service, 0.3, act)
    assert found[0]["error"]["code"] == "shutting_down"
    assert lasted < 60 and service.ended == {"cancelled": 1}


def test_a_second_signal_ends_it_at_once(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Though the service is busy with something that it cannot leave."""
    service = ScriptedService()
    busy = threading.Event()

    def script(ticket: Ticket) -> Iterator[Event]:
        yield Event(text="a", tokens=(1,))
        busy.wait(60)
        busy.set()
        yield Event(finish_reason="cancelled", usage=make_usage(ticket.request))

    service.script = script
    found: list[Any] = []

    def act(url: str) -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json=BODY | {"stream": True}, timeout=30) as response:
            os.kill(os.getpid(), signal.SIGTERM)
            eventually(lambda: service.drained)
            os.kill(os.getpid(), signal.SIGTERM)
            found.append(last_event(response))
            assert not busy.is_set()
        threading.Timer(0.5, busy.set).start()

    _, lasted = serve(engine, service, 600.0, act)
    assert found[0]["error"]["code"] == "shutting_down" and lasted < 60
    assert service.drained[:2] == [600.0, 0.0]
    assert caplog.records == []  # the last event came when nobody was there any more


def test_addresses() -> None:
    with listen("127.0.0.1", 0) as one:
        port = one.getsockname()[1]
        assert name_address(one) == f"http://127.0.0.1:{port}"
        with pytest.raises(InputError, match=f"--host 127.0.0.1 --port {port}: Address already in use"):
            listen("127.0.0.1", port)
    for host in ("198.51.100.7", "nowhere.invalid", "a" * 300, "\0"):
        with pytest.raises(InputError, match="choose another address"):
            listen(host, 0)
