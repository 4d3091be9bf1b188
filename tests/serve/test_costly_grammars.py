"""Schemas that are made to cost much: each is refused or followed within seconds, and others are answered meanwhile.

The limits are llguidance's own, of its lexer's states, its parser's items and the size of a grammar; here they are held
to. Levels are limited by what reads a body.
"""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hsai.infer import Engine, Service
from tests.serve.scripted import RunningServer, refusal

SECONDS = 60.0
"""Each takes well below one on an idle machine; one that exploded would take hours, or all memory."""


def text_of(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern}


def nest(levels: int) -> str:
    """A schema as text: `json` could not write so many levels."""
    return '{"type":"object","properties":{"a":' * levels + "{}" + "}}" * levels


SCHEMAS = {
    "repetitions of repetitions": text_of("^(a{1,1000}){1,1000}$"),
    "three of them": text_of("^((a{1,1000}){1,1000}){1,1000}$"),
    "a subset automaton of 2^200 states": text_of("^(a|b)*a(a|b){200}$"),
    "classes that overlap": text_of("^" + "".join(f"(x|[^{chr(97 + index % 26)}])*" for index in range(300)) + "$"),
    "a thousand branches": {
        "anyOf": [{"type": "object", "properties": {str(index): {"type": "integer"}}} for index in range(1000)]
    },
    "references that double at each of 30 levels": {
        "$defs": {
            f"d{index}": {"type": "object", "properties": {name: {"$ref": f"#/$defs/d{index + 1}"} for name in "ab"}}
            for index in range(30)
        }
        | {"d30": {"type": "integer"}},
        "$ref": "#/$defs/d0",
    },
    "a million items": {"type": "array", "minItems": 1_000_000, "items": {"type": "integer"}},
    "multiples of a large prime": {"type": "integer", "multipleOf": 99_991, "minimum": -(10**15), "maximum": 10**15},
}


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[RunningServer]:
    """Around a real service of two rows, which has answered once in each of the ways that are asked for here."""
    with RunningServer(engine, Service(engine, rows=2, tokens=4 * 48)) as server:
        assert ask(server, {"type": "string"}).is_success and server.complete(max_tokens=2).is_success
        yield server


def ask(server: RunningServer, schema: Any) -> Any:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    return server.chat(max_tokens=12, temperature=0, response_format=form)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_costly_schema_costs_others_little(
    name: str, server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[Any] = []
    begun = time.monotonic()
    costly = threading.Thread(target=lambda: answers.append(ask(server, SCHEMAS[name])))
    costly.start()
    assert server.complete(max_tokens=4, temperature=0).is_success
    costly.join(SECONDS)
    assert not costly.is_alive() and time.monotonic() - begun < SECONDS
    (answer,) = answers
    if answer.status_code == 200:
        assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")
    else:  # it cannot be used, or the parser gave up in the middle
        found = refusal(answer)
        assert (found["status"], found["param"]) == (400, "response_format"), found
        assert (found["code"] == "schema_too_large") == ("the parser of a constraint gave up: " in caplog.text)
    assert server.service.healthy
    assert server.complete(max_tokens=4, temperature=0).is_success


def test_a_schema_of_a_thousand_levels(server: RunningServer) -> None:
    head = '{"model": "tiny", "prompt": "x", "response_format": {"type": "json_schema", "json_schema": '
    found = refusal(server.post((head + f'{{"name": "s", "schema": {nest(1000)}}}}}}}').encode()))
    assert (found["status"], found["code"]) == (400, "invalid_json") and "128" in found["message"]
    deepest = json.loads(nest(60))
    assert ask(server, deepest).is_success
    assert server.complete(max_tokens=4, temperature=0).is_success
