"""Clients that dawdle, leave, or are too many; answers that take too long: bounded, and nobody else waits for them."""

import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import pytest

from hsai.infer import Engine
from hsai.infer.request import Event
from hsai.infer.service import Ticket
from hsai.serve import generate
from hsai.serve.linger import Linger
from hsai.serve.protocol import PatientProtocol
from hsai.serve.served import Limits
from tests.serve.scripted import (
    RunningServer,
    ScriptedService,
    eventually,
    make_usage,
    refusal,
    speak,
    wait_for_cancel,
)
from tests.serve.test_answers import joined, read_stream

BODY = b'{"model": "tiny", "prompt": "x", "stream": true}'
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % len(BODY)
) + BODY


@contextmanager
def connect(server: RunningServer, data: bytes, buffer: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as peer:
        if buffer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        peer.settimeout(30)
        peer.connect(("127.0.0.1", server.port))
        peer.sendall(data)
        yield peer


def read_to_end(peer: socket.socket) -> bytes:
    """What comes until the server drops the connection; it must do so within the peer's timeout."""
    answer = b""
    with suppress(ConnectionResetError):
        while part := peer.recv(1 << 16):
            answer += part
    return answer


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", REQUEST[:60]])
def test_a_head_that_does_not_come(
    sent: bytes, server: RunningServer, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However steadily its bytes come; a connection that had a request before is no better."""
    monkeypatch.setattr(PatientProtocol, "head_seconds", 0.4)
    with connect(server, sent) as peer, connect(server, sent) as drip:
        begun = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while time.monotonic() < begun + 60:
                drip.sendall(b"X" if sent else b"\n")
                time.sleep(0.05)
                assert server.complete().is_success
        read_to_end(peer)


EARLY = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 90\r\n\r\n"


def test_an_answer_before_the_body_has_come_is_not_lost(server: RunningServer) -> None:
    """The system would reset a connection whose other end is closed, and forget what was not read yet."""
    with connect(server, EARLY) as peer:
        for _ in range(3):
            time.sleep(0.1)
            peer.sendall(b"x" * 30)
        answer = b""
        while part := peer.recv(10):
            answer += part
    assert answer.startswith(b"HTTP/1.1 415 ") and answer.endswith(b"}}")


def test_a_body_that_does_not_come_behind_its_answer(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linger, "seconds", 0.4)
    with connect(server, EARLY) as peer:
        begun = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while time.monotonic() < begun + 60:
                peer.sendall(b"X")
                time.sleep(0.05)


def test_a_second_head_that_does_not_come(
    server: RunningServer, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatientProtocol, "head_seconds", 0.4)
    with connect(server, REQUEST) as peer:
        answer = b""
        while b"[DONE]" not in answer:
            answer += peer.recv(1 << 16)
        begun = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while time.monotonic() < begun + 60:
                peer.sendall(b"X")
                time.sleep(0.05)


def test_a_connection_outlives_those_that_clients_keep(server: RunningServer) -> None:
    """httpx lets go of a connection after 5 seconds; a server that did so too would now and then be first."""
    request = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    with connect(server, request) as peer:
        assert b"200 OK" in peer.recv(1 << 16)
        # What may still come of the answer is its body; an end would be readable until then.
        while select.select([peer], [], [], 6.0)[0]:
            assert peer.recv(1 << 16) != b""
        peer.sendall(request)
        assert b"200 OK" in peer.recv(1 << 16)


def test_an_answer_may_take_longer_than_a_head(
    server: RunningServer, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatientProtocol, "head_seconds", 0.2)
    service.script = speak("a", "b", pause=0.3)
    assert joined(read_stream(server.complete(stream=True))[:-1], "text") == "ab"


def test_a_body_that_does_not_come(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linger, "seconds", 0.3)
    with RunningServer(engine, ScriptedService(), limits=Limits(body_seconds=0.3)) as server:
        with connect(server, REQUEST[:-5]) as peer:
            assert server.complete().is_success
            answer = read_to_end(peer)
            assert answer.startswith(b"HTTP/1.1 408 ") and b"0.3 seconds" in answer
        assert server.service.tickets[1:] == []


def test_a_body_that_comes_byte_by_byte(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte is no reason to wait longer for the next; meanwhile others are served."""
    monkeypatch.setattr(Linger, "seconds", 0.3)
    head = REQUEST[: -len(BODY)].replace(b"Content-Length: %d" % len(BODY), b"Content-Length: 9000")
    with RunningServer(engine, ScriptedService(), limits=Limits(body_seconds=0.6)) as server:
        with connect(server, head) as peer:
            assert server.complete().is_success
            begun = time.monotonic()
            while not select.select([peer], [], [], 0.05)[0] and time.monotonic() < begun + 60:
                peer.sendall(b" ")
            answer = read_to_end(peer)
            assert answer.startswith(b"HTTP/1.1 408 ") and b"0.6 seconds" in answer
        assert server.service.tickets[1:] == []


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long(stream: bool, engine: Engine) -> None:
    """The request ends, and clients are told not to try again at once."""
    service = ScriptedService()
    service.script = wait_for_cancel
    with RunningServer(engine, service, limits=Limits(seconds=0.5)) as server:
        response = server.complete(stream=stream)
        if stream:
            *_, last = read_stream(response)
            error = last["error"]
        else:
            error = refusal(response)
            assert error["status"] == 504 and response.headers["x-should-retry"] == "false"
        assert error["code"] == "timeout" and "0.5 seconds" in error["message"]
        eventually(lambda: service.ended == {"cancelled": 1})


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(stream: bool, server: RunningServer, service: ScriptedService) -> None:
    service.script = wait_for_cancel
    body = BODY if stream else BODY.replace(b"true", b"null")
    with connect(server, REQUEST.replace(BODY, body)):
        eventually(lambda: service.tickets)
        assert not service.tickets[0].cancelled
    eventually(lambda: service.ended == {"cancelled": 1})
    service.script = speak("next")
    assert server.complete().json()["choices"][0]["text"] == "next"


def test_a_client_that_leaves_before_it_is_taken(
    engine: Engine, server: RunningServer, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its prompt still becomes tokens."""
    encode = engine.encode_prompt

    def encode_slowly(prompt: str) -> list[int]:
        time.sleep(0.3)
        return encode(prompt)

    monkeypatch.setattr(engine, "encode_prompt", encode_slowly)
    service.script = wait_for_cancel
    with connect(server, REQUEST):
        time.sleep(0.1)
    eventually(lambda: service.ended == {"cancelled": 1})


WHOLE = 32 << 20
"""Characters of an answer that sockets do not hold."""


def flood(ticket: Ticket) -> Iterator[Event]:
    """Far more than sockets hold, in as many events as are asked for."""
    made = 0
    while made < ticket.request.max_tokens * 1000 and not ticket.cancelled:
        made += 1
        yield Event(text="x" * 20_000, tokens=(1,))
        time.sleep(0.001)
    reason = "cancelled" if ticket.cancelled else "max_tokens"
    yield Event(finish_reason=reason, usage=make_usage(ticket.request, made))  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_does_not_read(
    stream: bool, server: RunningServer, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is dropped, though it still takes a byte now and then; the service never waits for it."""
    monkeypatch.setattr(PatientProtocol, "stall_seconds", 0.5)
    service.script = flood if stream else speak("x" * WHOLE)
    body = BODY if stream else BODY.replace(b"true", b"null")
    with connect(server, REQUEST.replace(BODY, body), buffer=4096) as peer:
        eventually(lambda: service.tickets)
        begun, taken = time.monotonic(), 0
        while server.http.server_state.tasks:
            assert time.monotonic() < begun + 60
            with suppress(ConnectionResetError):
                taken += len(peer.recv(1))
            time.sleep(0.05)
        eventually(lambda: service.ended == {"cancelled" if stream else "end_of_text": 1})
        service.script = speak("next")
        assert server.complete().json()["choices"][0]["text"] == "next"
        assert stream or 0 < taken + len(read_to_end(peer)) < WHOLE


def test_a_slow_reader_gets_all(server: RunningServer, service: ScriptedService) -> None:
    """What is said while it does not read comes in fewer chunks."""
    service.script = speak(*map(str, range(3000)))
    with connect(server, REQUEST) as peer:
        time.sleep(0.3)
        answer = b""
        while b"[DONE]" not in answer:
            answer += peer.recv(2000)
    text = answer.split(b"\r\n\r\n", 1)[1].replace(b"\r\n", b"").decode()
    pieces = [part.split('"', 1)[0] for part in text.split('"text":"')[1:]]
    assert "".join(pieces) == "".join(map(str, range(3000))) and len(pieces) < 3000


def test_a_quiet_stream_says_that_it_lives(
    server: RunningServer, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "QUIET_SECONDS", 0.05)
    service.script = speak("a", "b", pause=0.3)
    text = server.complete(stream=True).text
    assert text.count(": still at it\n\n") >= 2 and text.endswith("data: [DONE]\n\n")


def test_too_many_connections(server: RunningServer, service: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.complete().is_success
    monkeypatch.setattr(PatientProtocol, "connections_at_most", 3)
    with connect(server, b""), connect(server, b""):
        eventually(lambda: len(server.http.server_state.connections) == 3)
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url + "/health")
        assert server.complete().is_success  # on the connection that it has
    eventually(lambda: len(server.http.server_state.connections) == 1)
    assert httpx.get(server.url + "/health").is_success
