"""PyPI's own `openai` client, against the real service: whole and streamed texts are what the engine makes engine."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pydantic
import pytest

from hsai.infer import Engine
from hsai.infer.defaults import GenerationDefaults
from hsai.infer.sampling import SamplingConfig
from hsai.infer.service import Busy, Service
from tests.serve.scripted import MODEL, RunningServer, ScriptedService, eventually, fail

KEY = "a key of the test"
MESSAGES = [{"role": "system", "content": "def"}, {"role": "user", "content": "return 'héron'"}]


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[RunningServer]:
    with RunningServer(engine, Service(engine), api_key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "hsai"
    with pytest.raises(openai.NotFoundError, match='"other" is not served'):
        client.models.retrieve("other")


def test_chats(client: openai.OpenAI, engine: Engine) -> None:
    expected = engine.chat(MESSAGES, max_tokens=6)
    settings = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**settings)
    assert whole.choices[0].message.content == expected.text and expected.text
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (expected.prompt_tokens, 6)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage
    with client.chat.completions.stream(**settings) as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == expected.text


def test_completions(client: openai.OpenAI, engine: Engine) -> None:
    expected = engine.generate("def main", max_tokens=6)
    settings = {"model": MODEL, "prompt": "def main", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**settings)
    assert whole.choices[0].text == expected.text and expected.text
    chunks = client.completions.create(**settings, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text


def test_draws_follow_the_seed(client: openai.OpenAI, engine: Engine) -> None:
    sampling = SamplingConfig(temperature=1.5, top_p=0.95, top_k=50, seed=11)
    expected = engine.generate("def", max_tokens=8, sampling=sampling).text
    texts = [
        client.completions.create(
            model=MODEL,
            prompt="def",
            max_tokens=8,
            temperature=1.5,
            top_p=0.95,
            seed=seed,
            extra_body={"top_k": 50},
        )
        .choices[0]
        .text
        for seed in (11, 11, 12)
    ]
    assert texts[0] == texts[1] == expected != texts[2]


def test_probabilities_stops_and_penalties(client: openai.OpenAI, engine: Engine) -> None:
    expected = engine.generate("def", max_tokens=8, logprobs=2, sampling=SamplingConfig(repetition_penalty=1.3))
    stop = expected.text[3:5]
    whole = client.completions.create(
        model=MODEL,
        prompt="def",
        max_tokens=8,
        logprobs=2,
        temperature=0,
        stop=[stop],
        extra_body={"repetition_penalty": 1.3},
    )
    choice = whole.choices[0]
    assert choice.text == expected.text[: expected.text.index(stop)] and choice.finish_reason == "stop"
    found = choice.logprobs.token_logprobs
    np.testing.assert_allclose(found, [entry.logprob for entry in expected.logprobs[: len(found)]], atol=1e-4)
    assert all(len(top) <= 2 for top in choice.logprobs.top_logprobs)


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-4},
        {"temperature": 2, "top_k": 10**30},
        {"temperature": 1, "top_p": 5e-324},
        {"temperature": 1, "min_p": 1},
        {"temperature": 1, "min_p": 5e-324, "seed": 2**32 - 1},
        {"temperature": 1e-4, "repetition_penalty": 10},
        {"temperature": 2, "repetition_penalty": 0.1},
        {"max_tokens": 10**300},
    ],
)
def test_extremes(extreme: dict[str, Any], client: openai.OpenAI, served: RunningServer) -> None:
    settings = {"max_tokens": 4, "seed": 1, **extreme}  # without a seed the text may end at once
    done = client.completions.create(model=MODEL, prompt=[5] * 40, extra_body=settings)
    assert done.usage.completion_tokens > 0 and served.service.healthy


class Verdict(pydantic.BaseModel):
    """What an answer must be."""

    model_config = pydantic.ConfigDict(extra="forbid")
    good: bool


def test_answers_of_a_form(client: openai.OpenAI) -> None:
    """Whatever a random model would say: mostly blanks, which with other seeds fill the context."""
    settings = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "temperature": 1}
    for seed in (0, 5, 7):
        done = client.chat.completions.parse(**settings, seed=seed, response_format=Verdict)
        assert done.choices[0].message.parsed.good in (True, False)
    with pytest.raises(openai.BadRequestError) as caught:
        schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "no such type"}}}
        client.chat.completions.create(**settings, response_format=schema)
    assert caught.value.param == "response_format"


def test_the_context_ends_a_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=[5] * 46, max_tokens=30, temperature=0)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 3


def test_errors_have_the_clients_types(client: openai.OpenAI, served: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[5] * 49)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="tools are not supported") as caught:
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[tool])
    assert caught.value.param == "tools"
    with pytest.raises(openai.NotFoundError, match="embeddings are not served"):
        client.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.AuthenticationError, match="no valid API key"):
        client.with_options(api_key="another").models.list()


@pytest.fixture
def scripted_client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_a_full_queue_is_the_clients_rate_limit(scripted_client: openai.OpenAI, service: ScriptedService) -> None:
    service.refusal = Busy(3, 1.5)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError, match="3 requests are waiting") as caught:
            scripted_client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
        assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("queue_full", "2")


def test_a_failure_in_mid_stream_is_the_clients_error(scripted_client: openai.OpenAI, service: ScriptedService) -> None:
    service.script = fail
    chats = scripted_client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    completions = scripted_client.completions.create(model=MODEL, prompt="x", stream=True)
    for chunks, read in ((chats, lambda choice: choice.delta.content), (completions, lambda choice: choice.text)):
        pieces = []
        with pytest.raises(openai.APIError, match="the server failed") as caught:
            for chunk in chunks:
                pieces += [read(choice) for choice in chunk.choices]
        assert "".join(pieces) == "so far " and caught.value.code == "internal_error"


def test_a_stream_that_is_left_ends(client: openai.OpenAI, served: RunningServer) -> None:
    settings = {"model": MODEL, "prompt": [5], "max_tokens": 40, "temperature": 0}
    for _ in range(20):  # a busy machine may make all of the text before it hears that the client has left
        with client.completions.create(**settings, stream=True) as stream:
            next(iter(stream))
        eventually(lambda: served.service.stats().running == 0)
        if served.service.stats().finished["cancelled"]:
            break
    whole = client.completions.create(**settings)
    assert whole.choices[0].text
    eventually(lambda: served.service.stats().running == 0)
    stats = served.service.stats()
    assert (stats.queued, stats.pages_used, stats.finished["cancelled"]) == (0, 0, 1)


def test_what_a_model_draws_with_holds_where_nothing_is_said(engine: Engine) -> None:
    service = ScriptedService()
    defaults = GenerationDefaults(temperature=0.7, top_k=5, max_tokens=4)
    with (
        RunningServer(engine, service, defaults=defaults) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client,
    ):
        client.chat.completions.create(model=MODEL, messages=MESSAGES)
    request = service.tickets[0].request
    assert (request.sampling.temperature, request.sampling.top_k, request.max_tokens) == (0.7, 5, 4)
