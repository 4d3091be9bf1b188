"""OpenAI's forms, byte for byte: whole, and in chunks."""

import json
from typing import Any

import httpx
import pytest

from hsai.infer import Engine, SamplingConfig
from hsai.infer.request import Event, TokenLogprob
from hsai.serve.answers import ChatAnswer, CompletionAnswer
from tests.serve.scripted import MODEL, RunningServer, ScriptedService, fail, make_usage, speak

USAGE = {
    "prompt_tokens": 2,
    "completion_tokens": 3,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1},
}


def read_stream(response: httpx.Response) -> list[Any]:
    """The events of a stream: objects, and "[DONE]" as it is."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    *events, rest = response.text.split("\n\n")
    assert rest == "" and all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event[6:] if event == "data: [DONE]" else json.loads(event[6:]) for event in events]


def strip(content: dict[str, Any], prefix: str) -> dict[str, Any]:
    """An object without what differs each time, which is checked."""
    assert content.pop("id").startswith(prefix) and content.pop("created") > 1_700_000_000
    assert content.pop("model") == MODEL
    return content


def test_a_chat_as_a_whole(server: RunningServer, service: ScriptedService) -> None:
    response = server.chat(max_tokens=7, temperature=0.5, seed=3, stop="!")
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    assert strip(response.json(), "chatcmpl-") == {
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello, world", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE | {"prompt_tokens": 3, "total_tokens": 6},
    }
    (ticket,) = service.tickets
    engine = server.engine
    assert ticket.request.tokens == tuple(engine.tokenizer.encode("<|user|>x<|assistant|>", special=True))
    assert (ticket.request.max_tokens, ticket.request.stop) == (7, ("!",))
    assert ticket.request.sampling == SamplingConfig(temperature=0.5, seed=3)


def test_a_completion_as_a_whole(server: RunningServer, service: ScriptedService) -> None:
    service.script = speak("a", "b", "c", reason="max_tokens")
    assert strip(server.complete().json(), "cmpl-") == {
        "object": "text_completion",
        "choices": [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "length"}],
        "usage": USAGE,
    }
    assert service.tickets[0].request.tokens == tuple(server.engine.encode_prompt("x"))
    assert service.tickets[0].request.max_tokens == 16
    assert server.complete(prompt=[5, 6], max_tokens=10**9).status_code == 200
    assert service.tickets[1].request.tokens == (5, 6)
    assert service.tickets[1].request.max_tokens == server.engine.runtime.slots


@pytest.mark.parametrize(
    ("reason", "word"), [("end_of_text", "stop"), ("stop", "stop"), ("max_tokens", "length"), ("context", "length")]
)
def test_reasons(reason: str, word: str, server: RunningServer, service: ScriptedService) -> None:
    service.script = speak("a", reason=reason)
    assert server.chat().json()["choices"][0]["finish_reason"] == word


def joined(chunks: list[Any], *path: str) -> str:
    """The text that chunks give."""
    text = ""
    for chunk in chunks:
        for choice in chunk["choices"]:
            part = choice
            for name in path:
                part = part.get(name, "") if isinstance(part, dict) else part
            text += part or ""
    return text


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_chat_as_it_comes(include_usage: bool, server: RunningServer, service: ScriptedService) -> None:
    service.script = speak("Hello", ", ", "world", pause=0.01)
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    *chunks, done = read_stream(server.chat(stream=True, **options))
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == len({chunk["created"] for chunk in chunks}) == 1
    stripped = [strip(chunk, "chatcmpl-") for chunk in chunks]
    assert all(chunk.pop("object") == "chat.completion.chunk" for chunk in stripped)
    if include_usage:
        assert stripped.pop() == {"choices": [], "usage": USAGE | {"prompt_tokens": 3, "total_tokens": 6}}
        assert all(chunk.pop("usage", "absent") is None for chunk in stripped)
    empty = {"index": 0, "logprobs": None, "finish_reason": None}
    assert stripped[0] == {"choices": [empty | {"delta": {"role": "assistant", "content": ""}}]}
    assert stripped[-1] == {"choices": [empty | {"delta": {}, "finish_reason": "stop"}]}
    assert joined(stripped[1:-1], "delta", "content") == "Hello, world"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in stripped[:-1])


def test_a_completion_as_it_comes(server: RunningServer, service: ScriptedService) -> None:
    service.script = speak("é", "€", "😀\n\n", pause=0.01, reason="context")
    *chunks, done = read_stream(server.complete(stream=True))
    assert done == "[DONE]" and joined(chunks, "text") == "é€😀\n\n"
    assert [chunk["object"] for chunk in chunks] == ["text_completion"] * len(chunks)
    assert chunks[-1]["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}]


def test_a_failure_in_the_middle(server: RunningServer, service: ScriptedService) -> None:
    """A stream that ends without [DONE] is known not to be whole."""
    service.script = fail
    *chunks, last = read_stream(server.chat(stream=True))
    assert joined(chunks, "delta", "content") == "so far "
    assert last["error"]["type"] == "server_error" and "log" in last["error"]["message"]
    assert "[DONE]" not in chunks
    response = server.chat()
    assert response.status_code == 500 and response.json() == last


def chat_entry(engine: Engine, token: int, logprob: float) -> dict[str, Any]:
    data = engine.tokenizer.decode_bytes([token])
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


@pytest.mark.parametrize("top", [None, 2])
def test_logprobs_of_a_chat(top: int | None, server: RunningServer, service: ScriptedService) -> None:
    engine = server.engine
    alternatives = [chat_entry(engine, 10, -0.5), chat_entry(engine, 11, -1.5)] if top else []
    wanted = [chat_entry(engine, token, -0.25) | {"top_logprobs": alternatives} for token in (10, 11, 12)]
    settings = {"logprobs": True} | ({"top_logprobs": top} if top else {})
    choice = server.chat(**settings).json()["choices"][0]
    assert service.tickets[0].request.logprobs == (top or 0)
    assert choice["logprobs"] == {"content": wanted, "refusal": None}
    *chunks, _ = read_stream(server.chat(stream=True, **settings))
    found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in found if part for entry in part["content"]] == wanted


def test_logprobs_of_a_completion(server: RunningServer) -> None:
    texts = [server.engine.tokenizer.decode_bytes([token]).decode() for token in (10, 11, 12)]
    offsets = [0, len(texts[0]), len(texts[0] + texts[1])]
    wanted = {
        "tokens": texts,
        "token_logprobs": [-0.25] * 3,
        "top_logprobs": [{texts[0]: -0.5, texts[1]: -1.5}] * 3,
        "text_offset": offsets,
    }
    assert server.complete(logprobs=2).json()["choices"][0]["logprobs"] == wanted
    *chunks, _ = read_stream(server.complete(logprobs=2, stream=True))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert {name: [entry for part in parts for entry in part[name]] for name in wanted} == wanted
    assert server.complete(logprobs=0).json()["choices"][0]["logprobs"]["top_logprobs"] is None


@pytest.mark.parametrize("form", [ChatAnswer, CompletionAnswer])
def test_what_json_cannot_hold(form: Any, engine: Engine) -> None:
    """A probability of none, half a character, and a special token, which stands for no text."""
    tokenizer = engine.tokenizer
    half = tokenizer.encode("数")[0]
    special = next(iter(tokenizer.stops))
    request = type("Asked", (), {"tokens": (1,)})()
    found = tuple(TokenLogprob(token, float("-inf"), ((token, float("-inf")),)) for token in (half, special))
    event = Event(logprobs=found, finish_reason="stop", usage=make_usage(request))
    text = json.dumps(form(MODEL, tokenizer, logprobs=True).whole(event), allow_nan=False)
    name = "\\ufffd" if form is ChatAnswer else json.dumps("bytes:\\x")[1:-1]
    assert "-9999.0" in text and name in text and tokenizer.name(special) in text


def test_parts_of_characters_have_names_of_their_own(engine: Engine) -> None:
    """Alternatives that are no text alone are as many as there are, and the texts' places are those of the whole."""
    tokenizer = engine.tokenizer
    tokens = tokenizer.encode("數x")
    parts, last = tokens[:-1], tokens[-1]
    assert len(parts) > 1
    top = tuple((token, -0.5 - rank) for rank, token in enumerate(parts))
    found = tuple(TokenLogprob(token, -0.25, top) for token in tokens)
    request = type("Asked", (), {"tokens": (1,)})()
    event = Event(text="數x", logprobs=found, finish_reason="stop", usage=make_usage(request))
    logprobs = CompletionAnswer(MODEL, tokenizer, logprobs=True).whole(event)["choices"][0]["logprobs"]
    names = ["bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.decode_bytes([token])) for token in parts]
    assert logprobs["tokens"] == [*names, tokenizer.decode([last])]
    assert logprobs["top_logprobs"] == [{name: -0.5 - rank for rank, name in enumerate(names)}] * len(tokens)
    assert logprobs["text_offset"] == [0] * len(parts) + [1]
