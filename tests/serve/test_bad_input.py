"""Whatever comes over the wire: an error object or a dropped connection, and the server goes on."""

import concurrent.futures
import json
import random
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from hsai.infer import Engine
from hsai.infer.request import Event
from hsai.infer.service import Busy, Closed, Ticket
from hsai.serve.served import Limits
from tests.serve.scripted import MODEL, RunningServer, ScriptedService, eventually, refusal, speak

LONG = Limits().body_bytes - 100
"""Characters of the longest prompt that a body holds."""

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(autouse=True)
def still_there(server: RunningServer, service: ScriptedService) -> Iterator[None]:
    """After each test, the server answers as before."""
    yield
    service.reset()
    assert server.complete().json()["choices"][0]["text"] == "Hello, world"


def exchange(server: RunningServer, data: bytes) -> bytes:
    """What is answered to bytes, until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as peer:
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        answer = b""
        while part := peer.recv(1 << 16):
            answer += part
        return answer


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[]", b'{"a": NaN}', b"[" * 50_000, b'{"model": 1e999}'])
def test_bodies_that_are_no_object(body: bytes, server: RunningServer, service: ScriptedService) -> None:
    found = refusal(server.post(body))
    assert (found["status"], found["code"]) == (400, "invalid_json")
    assert service.tickets == []


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_bodies_that_a_foreign_page_could_send(kind: str, server: RunningServer, service: ScriptedService) -> None:
    """Without asking its browser's leave first."""
    found = refusal(server.post(b'{"model": "tiny", "prompt": "x"}', **{"content-type": kind}))
    assert found["status"] == 415 and "application/json" in found["message"] and service.tickets == []
    assert server.post(b'{"model": "tiny", "prompt": "x"}', **{"content-type": "Application/JSON; a=b"}).is_success


def test_compressed_bodies(server: RunningServer) -> None:
    assert refusal(server.post(b"\x1f\x8b", **{"content-encoding": "gzip"}))["status"] == 415


def test_another_model(server: RunningServer) -> None:
    found = refusal(server.complete(model="gpt-4"))
    assert (found["status"], found["param"], found["code"]) == (404, "model", "model_not_found")
    assert '"gpt-4"' in found["message"] and f'"{MODEL}"' in found["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "names"),
    [
        ("GET", "/nope", 404, ("GET /nope",)),
        ("GET", "/v1/completions", 405, ("GET /v1/completions", "POST")),
        ("DELETE", "/v1/models", 405, ("DELETE", "GET")),
        ("POST", "/v1/embeddings", 404, ("embeddings",)),
        ("GET", "/v1/models/other", 404, ('"other"', f'"{MODEL}"')),
        ("GET", "/v1/models/%ff%00%0a", 404, ("valid is",)),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404, ()),
        ("GET", "/v1/models/", 404, ('""',)),
        ("OPTIONS", "/v1/completions", 405, ()),
    ],
)
def test_paths(method: str, path: str, status: int, names: tuple[str, ...], server: RunningServer) -> None:
    response = server.client.request(method, path)
    found = refusal(response)
    assert found["status"] == status and all(name in found["message"] for name in names)
    assert "access-control-allow-origin" not in response.headers


def test_prompts_that_are_too_long(server: RunningServer, service: ScriptedService) -> None:
    for response, param in (
        (server.complete(prompt="\x01" * 49), "prompt"),
        (server.complete(prompt=[1] * 49), "prompt"),
        (server.chat(messages=[{"role": "user", "content": "\x01" * 60}]), "messages"),
    ):
        found = refusal(response)
        assert (found["status"], found["param"], found["code"]) == (400, param, "context_length_exceeded")
        assert "48" in found["message"]
    assert service.tickets == []
    assert server.complete(prompt=[1] * 48).is_success


@pytest.mark.parametrize("prompt", ["x" * LONG, "def main(): " * (LONG // 12), " " * LONG])
def test_a_prompt_of_a_mebibyte(prompt: str, server: RunningServer, service: ScriptedService) -> None:
    """It is refused as any that is too long, and another client is answered before."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url) as other:
        long = pool.submit(server.complete, prompt=prompt)
        answered = 0
        while not long.done():
            assert other.get("/health", timeout=30).is_success
            answered += not long.done()
        found = refusal(long.result())
    assert (found["status"], found["param"], found["code"]) == (400, "prompt", "context_length_exceeded")
    assert answered > 0 and service.tickets == []


@pytest.mark.parametrize(("token", "names"), [(285, ("285", "284")), (-1, ("-1",)), (10**300, ("out of range",))])
def test_tokens_that_are_none(token: int, names: tuple[str, ...], server: RunningServer) -> None:
    found = refusal(server.complete(prompt=[1, token]))
    assert found["status"] == 400 and found["param"] == "prompt"
    assert all(name in found["message"] for name in names), found["message"]


def test_a_model_without_a_chat_template(engine: Engine) -> None:
    plain = Engine(engine.runtime, engine.tokenizer)
    with RunningServer(plain, ScriptedService()) as server:
        found = refusal(server.chat())
    assert found["status"] == 400 and "no chat template" in found["message"] and found["param"] == "messages"


def test_what_the_service_refuses(server: RunningServer, service: ScriptedService) -> None:
    for refused, status, header in (
        (Busy(64, 2.5), 429, ("retry-after", "3")),
        (Busy(64, 0.0), 429, ("retry-after", "1")),
        (Closed("closing"), 503, ("retry-after", "5")),
    ):
        service.refusal = refused
        for stream in (False, True):
            response = server.complete(stream=stream)
            assert refusal(response)["status"] == status
            assert response.headers[header[0]] == header[1]


def test_who_is_turned_away_costs_no_tokenizing(
    server: RunningServer, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*arguments: Any, **options: Any) -> list[int]:
        raise AssertionError("its prompt was encoded")

    service.refusal = Busy(64, 2.5)
    monkeypatch.setattr(type(server.engine.tokenizer), "encode", encode)
    assert refusal(server.complete())["status"] == refusal(server.chat())["status"] == 429


def test_a_defect_says_nothing_of_itself(
    server: RunningServer, service: ScriptedService, caplog: pytest.LogCaptureFixture
) -> None:
    service.refusal = ZeroDivisionError("secret")
    found = refusal(server.chat())
    assert (found["status"], found["type"]) == (500, "server_error") and "secret" not in found["message"]
    eventually(lambda: "ZeroDivisionError: secret" in caplog.text)


def test_sizes(engine: Engine) -> None:
    with RunningServer(engine, ScriptedService(), limits=Limits(body_bytes=1000)) as server:
        body = b'{"model": "tiny", "prompt": "x"}'
        assert server.post(body + b" " * (1000 - len(body))).is_success
        for response in (
            server.post(body + b" " * 1000),
            server.post(body + b" " * 5_000_000),
            server.client.post(
                "/v1/completions", content=(b" " * 400 for _ in range(9)), headers={"content-type": "application/json"}
            ),
        ):
            found = refusal(response)
            assert (found["status"], found["code"]) == (413, "request_too_large") and "1000" in found["message"]
        assert server.complete().is_success


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",  # a TLS hello
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
        HEAD + b"Content-Length: 500\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /health HTTP/1.1\r\nHost: elsewhere\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        HEAD + b"Transfer-Encoding: gzip\r\n\r\n{}",
        HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
        HEAD + b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_what_is_hardly_http(data: bytes, server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    """Nor does it fill the log."""
    check_answer(exchange(server, data), of_head=data.startswith(b"HEAD"))
    assert server.complete().is_success
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def check_answer(answer: bytes, *, of_head: bool = False) -> None:
    """Nothing, an answer (of a request that is one after all), or OpenAI's object of an error; HEAD leaves that out."""
    if not answer or (status := re.match(rb"HTTP/1.1 ([124]\d\d) ", answer)) is None or status[1][:1] != b"4":
        assert not answer or status is not None
        return
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower(), answer
    assert body == b"" if of_head else json.loads(body)["error"]["message"], answer


def test_noise(server: RunningServer) -> None:
    """Valid requests with bytes put in, taken out and changed."""
    draw = random.Random(0)
    body = b'{"model": "tiny", "prompt": "x", "max_tokens": 3}'
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for _ in range(150):
        data = bytearray(request)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(data))
            data[place : place + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
        check_answer(exchange(server, bytes(data)))


def test_requests_are_not_confused(server: RunningServer, service: ScriptedService) -> None:
    """Two in one packet, whose answers come in their order."""

    def script(ticket: Ticket) -> Iterator[Event]:
        return speak(str(ticket.request.tokens[0]))(ticket)

    service.script = script
    parts = []
    for token in (5, 6):
        body = b'{"model": "tiny", "prompt": [%d]}' % token
        parts.append(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as peer:
        peer.sendall(b"".join(parts))
        answer = b""
        while answer.count(b'"finish_reason"') < 2:
            answer += peer.recv(1 << 16)
    assert answer.index(b'"text":"5"') < answer.index(b'"text":"6"')
