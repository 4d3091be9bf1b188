"""Bodies become what is wanted, or are refused by the field's name."""

from typing import Any

import pytest

from hsai.infer import JsonSchema, SamplingConfig
from hsai.infer.defaults import GenerationDefaults
from hsai.serve.chat import read_chat_request
from hsai.serve.completion import read_completion_request
from hsai.serve.errors import ApiError

GREEDY = GenerationDefaults()
DRAWING = GenerationDefaults(temperature=0.7, top_k=40, top_p=0.9, min_p=0.1, repetition_penalty=1.1, max_tokens=5)
USER = {"role": "user", "content": "x"}


def chat(defaults: GenerationDefaults = GREEDY, /, **body: Any) -> Any:
    return read_chat_request({"model": "m", "messages": [USER], **body}, defaults)


def complete(defaults: GenerationDefaults = GREEDY, /, **body: Any) -> Any:
    return read_completion_request({"model": "m", "prompt": "x", **body}, defaults)


READERS = {"chat": chat, "complete": complete}


def test_what_is_not_said_is_the_models() -> None:
    wanted = chat(DRAWING)
    assert wanted.max_tokens == 5 and wanted.logprobs is None
    sampling = wanted.options.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.7, 40, 0.9, 0.1)
    assert sampling.repetition_penalty == 1.1
    assert chat().max_tokens is None and complete().max_tokens == 16
    assert chat().options.sampling.temperature == 0
    options = chat().options
    assert (options.stop, options.constraint, options.stream, options.include_usage) == ((), None, False, False)


@pytest.mark.parametrize("reader", READERS)
def test_what_is_said_comes_first(reader: str) -> None:
    said = {"temperature": 1, "top_k": 3, "top_p": 0.5, "min_p": 0, "repetition_penalty": 1.5, "seed": 7}
    options = READERS[reader](
        DRAWING, **said, stop=["a", "b"], stream=True, stream_options={"include_usage": True}, max_tokens=9
    ).options
    assert options.sampling == SamplingConfig(
        temperature=1.0, top_k=3, top_p=0.5, min_p=0.0, repetition_penalty=1.5, seed=7
    )
    assert (options.stop, options.stream, options.include_usage) == (("a", "b"), True, True)
    assert READERS[reader](stop="a").options.stop == ("a",)


def test_narrowings_have_no_say_at_temperature_0() -> None:
    """Clients send them together, and the likeliest token is always kept."""
    said = {"temperature": 0, "top_p": 0.9, "top_k": 5, "min_p": 0.5, "repetition_penalty": 2, "seed": 3}
    wanted = SamplingConfig(repetition_penalty=2.0, seed=3)
    assert chat(**said).options.sampling == chat(DRAWING, **said).options.sampling == wanted


@pytest.mark.parametrize("said", [{"temperature": 1e-9}, {"top_p": 0, "temperature": 1}, {"top_p": 0.0, "top_k": 3}])
@pytest.mark.parametrize("defaults", [GenerationDefaults(), DRAWING])
def test_what_leaves_the_likeliest_token_only(said: dict[str, Any], defaults: GenerationDefaults) -> None:
    assert chat(defaults, **said, seed=3).options.sampling == SamplingConfig(seed=3)


def test_seeds_of_64_bits() -> None:
    """Those of 32 are what they are elsewhere; the others are different draws."""
    ends = [-(2**63), -(2**32) - 7, -1, 2**32, 2**40 + 5, 2**63 - 1]
    seeds = [chat(temperature=1, seed=seed).options.sampling.seed for seed in [0, 7, 2**32 - 1, *ends]]
    assert seeds[:3] == [0, 7, 2**32 - 1]
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_another_seed_each_time_where_none_is_said() -> None:
    assert len({chat(temperature=1).options.sampling.seed for _ in range(8)}) == 8


def test_lengths() -> None:
    assert chat(max_tokens=3).max_tokens == chat(max_completion_tokens=3).max_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=3).max_tokens == 3
    assert chat(DRAWING, max_tokens=10**30).max_tokens == 10**30  # whatever the context holds


def test_logprobs() -> None:
    assert chat(logprobs=True).logprobs == 0 and chat(logprobs=True, top_logprobs=20).logprobs == 20
    assert chat(logprobs=False).logprobs is None
    assert complete(logprobs=0).logprobs == 0 and complete(logprobs=5).logprobs == 5


def test_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": parts, "name": "n"},
        {"role": "assistant", "content": "c", "refusal": None, "annotations": None, "tool_calls": None},
    ]
    assert chat(messages=messages).messages == (
        {"role": "system", "content": "d"},
        {"role": "user", "content": "a\nb", "name": "n"},
        {"role": "assistant", "content": "c"},
    )


@pytest.mark.parametrize("prompt", ["x", ["x"]])
def test_text_prompts(prompt: Any) -> None:
    assert complete(prompt=prompt).prompt == "x"


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]]])
def test_token_prompts(prompt: Any) -> None:
    assert complete(prompt=prompt).prompt == (1, 2)


@pytest.mark.parametrize("reader", READERS)
def test_response_formats(reader: str) -> None:
    def constraint(form: Any) -> Any:
        return READERS[reader](response_format=form).options.constraint

    assert constraint({"type": "text"}) is None
    assert constraint({"type": "json_object"}) == JsonSchema('{"type": "object"}')
    described = {"name": "n", "strict": True, "schema": {"type": "string"}}
    assert constraint({"type": "json_schema", "json_schema": described}) == JsonSchema('{"type": "string"}')


def test_what_asks_for_nothing_is_taken() -> None:
    nothing = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "u", "metadata": {}}
    assert complete(**nothing, best_of=1, echo=False, suffix=None, seed=1) == complete(seed=1)
    talk = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "store": False, "modalities": ["text"]}
    assert chat(**nothing, **talk, seed=1) == chat(seed=1)
    assert chat(seed=1, temperature=None, stop=None, stream=None, response_format=None) == chat(seed=1)


COMMON: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"temperature": -0.1}, "temperature", ("-0.1", "between 0 and 2")),
    ({"temperature": 2.1}, "temperature", ("2.1", "between 0 and 2")),
    ({"temperature": "hot"}, "temperature", ("a number", '"hot"')),
    ({"temperature": True}, "temperature", ("a number", "true")),
    ({"temperature": 10**300}, "temperature", ("1000", "...", "between 0 and 2")),
    ({"top_p": -0.1}, "top_p", ("-0.1", "between 0 and 1")),
    ({"top_p": 1.1}, "top_p", ("1.1", "between 0 and 1")),
    ({"top_k": 0}, "top_k", ("0", "at least 1")),
    ({"top_k": 1.5}, "top_k", ("an integer", "1.5")),
    ({"min_p": 2}, "min_p", ("2", "between 0 and 1")),
    ({"repetition_penalty": 0}, "repetition_penalty", ("0", "between 0.1 and 10")),
    ({"repetition_penalty": 1e9}, "repetition_penalty", ("1000000000.0", "between 0.1 and 10")),
    ({"seed": -(2**63) - 1}, "seed", ("-9223372036854775809", "between -9223372036854775808 and")),
    ({"seed": 2**63}, "seed", ("9223372036854775808", "and 9223372036854775807")),
    ({"max_tokens": 0}, "max_tokens", ("0", "at least 1")),
    ({"max_tokens": "3"}, "max_tokens", ("an integer", '"3"')),
    ({"n": 2}, "n", ("2", "one answer a request", "null or 1")),
    ({"n": True}, "n", ("true", "null or 1")),
    ({"stop": [""]}, "stop", ("0 characters", "1 to 256")),
    ({"stop": ["x" * 257]}, "stop", ("257 characters",)),
    ({"stop": ["x"] * 17}, "stop", ("17 strings", "at most 16")),
    ({"stop": 3}, "stop", ("a string", "3")),
    ({"stop": [None]}, "stop", ("a string", "null")),
    ({"stop": "\ud800"}, "stop", ("lone surrogate \\ud800 at 0",)),
    ({"stream": 1}, "stream", ("a boolean", "1")),
    ({"stream_options": {"include_usage": True}}, "stream_options", ("stream=true",)),
    ({"stream": True, "stream_options": []}, "stream_options", ("an object", "[]")),
    ({"stream": True, "stream_options": {"usage": 1}}, "stream_options.usage", ("include_usage",)),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", ("a boolean", "1")),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        ("true",),
    ),
    ({"user": [1]}, "user", ("a string", "[1]")),
    ({"safety_identifier": 3}, "safety_identifier", ("a string", "3")),
    ({"prompt_cache_key": "\ud800"}, "prompt_cache_key", ("lone surrogate",)),
    ({"service_tier": {}}, "service_tier", ("a string", "{}")),
    ({"metadata": 3}, "metadata", ("an object of strings", "3")),
    ({"metadata": {"a": 1}}, "metadata", ("an object of strings", '{"a": 1}')),
    ({"presence_penalty": 0.5}, "presence_penalty", ("0.5", "repetition_penalty")),
    ({"frequency_penalty": -2}, "frequency_penalty", ("-2",)),
    ({"logit_bias": {"5": 100}}, "logit_bias", ('{"5": 100}', "not supported")),
    ({"response_format": "json"}, "response_format", ("an object", '"json"')),
    ({"response_format": {}}, "response_format.type", ("null", "text, json_object, json_schema")),
    ({"response_format": {"type": "xml"}}, "response_format.type", ('"xml"', "json_schema")),
    ({"response_format": {"type": "text", "x": 1}}, "response_format.x", ("unknown field",)),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", ("missing",)),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        "response_format.json_schema.schema",
        ("missing",),
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": True}}},
        "response_format.json_schema.schema",
        ("an object", "true"),
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": [1]}},
        "response_format.json_schema",
        ("an object", "[1]"),
    ),
    *(
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, name: value}}},
            f"response_format.json_schema.{name}",
            names,
        )
        for name, value, names in (
            ("name", 3, ("a string", "3")),
            ("description", {}, ("a string", "{}")),
            ("strict", "yes", ("a boolean", '"yes"')),
        )
    ),
    ({"model": None}, "model", ("missing",)),
    ({"model": 3}, "model", ("a string", "3")),
    ({"temprature": 1}, "temprature", ("did you mean temperature?",)),
    ({"\ud800": 1}, "\ud800", ("\\ud800",)),
    ({"y" * 10**6: 1}, "y" * 100, ("yyy...",)),
]

CHAT: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"messages": None}, "messages", ("missing",)),
    ({"messages": []}, "messages", ("at least one", "[]")),
    ({"messages": "x"}, "messages", ("a list", '"x"')),
    ({"messages": ["x"]}, "messages[0]", ("an object", '"x"')),
    ({"messages": [USER, {"content": "x"}]}, "messages[1].role", ("null", "system, developer, user, assistant")),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", ('"tool"',)),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", ('["user"]',)),
    ({"messages": [{"role": "user"}]}, "messages[0].content", ("missing",)),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", ("a string", "3")),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", ("no parts",)),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", ("an object",)),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
        ('"image_url"', "valid: text"),
    ),
    ({"messages": [{**USER, "nmae": "x"}]}, "messages[0].nmae", ("did you mean name?",)),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls", ("tools",)),
    ({"messages": [{"role": "user", "content": "a\udfffb"}]}, "messages[0].content", ("\\udfff at 1",)),
    *(
        ({"messages": [{**USER, name: value}]}, f"messages[0].{name}", names)
        for name, value, names in (
            ("name", 3, ("a string", "3")),
            ("function_call", {}, ("tools are not supported", "{}")),
            ("audio", {"id": "a"}, ("a message is text",)),
            ("refusal", "no", ('"no"', "a message is text")),
            ("annotations", [1], ("[1]", "a message is text")),
        )
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
        "messages[0].content[0].text",
        ("a string", "3"),
    ),
    ({"tools": [{"type": "function"}]}, "tools", ("tools are not supported", "null or []")),
    ({"functions": [{"name": "f"}]}, "functions", ("tools are not supported",)),
    ({"tool_choice": "required"}, "tool_choice", ('"required"', "tools are not supported")),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", ("max_tokens=3",)),
    ({"max_completion_tokens": 0}, "max_completion_tokens", ("0", "at least 1")),
    ({"function_call": {"name": "f"}}, "function_call", ("tools are not supported",)),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls", ("a boolean", "1")),
    ({"prediction": "x"}, "prediction", ("an object", '"x"')),
    ({"audio": {}}, "audio", ("{}", "the answer is text")),
    ({"verbosity": "low"}, "verbosity", ("low", "not supported")),
    ({"web_search_options": {}}, "web_search_options", ("{}", "not supported")),
    ({"top_logprobs": 3}, "top_logprobs", ("3", "logprobs=true")),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", ("21", "between 0 and 20")),
    ({"logprobs": 3}, "logprobs", ("a boolean", "3")),
    ({"modalities": ["text", "audio"]}, "modalities", ("audio", '["text"]')),
    ({"reasoning_effort": "high"}, "reasoning_effort", ("high", "not supported")),
    ({"store": True}, "store", ("true", "nothing is stored")),
    ({"prompt": "x"}, "prompt", ("unknown field",)),
]

COMPLETION: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"prompt": None}, "prompt", ("missing",)),
    ({"prompt": ["a", "b"]}, "prompt", ("2 prompts", "one a request")),
    ({"prompt": [[1], [2]]}, "prompt", ("2 prompts",)),
    ({"prompt": []}, "prompt", ("[]",)),
    ({"prompt": [1, "a"]}, "prompt", ("token ids", "a")),
    ({"prompt": [True]}, "prompt", ("token ids", "true")),
    ({"prompt": [1.0]}, "prompt", ("token ids",)),
    ({"prompt": [[[1]]]}, "prompt", ("token ids",)),
    ({"prompt": {"a": 1}}, "prompt", ("a string",)),
    ({"logprobs": True}, "logprobs", ("an integer", "true")),
    ({"logprobs": 21}, "logprobs", ("21", "20")),
    ({"best_of": 3}, "best_of", ("3",)),
    ({"echo": True}, "echo", ("true", "not sent back")),
    ({"suffix": "x"}, "suffix", ('"x"', "at its end")),
    ({"messages": [USER]}, "messages", ("unknown field",)),
]

CASES = [
    *((reader, *case) for reader in READERS for case in COMMON),
    *(("chat", *case) for case in CHAT),
    *(("complete", *case) for case in COMPLETION),
]


@pytest.mark.parametrize(
    ("reader", "body", "param", "names"), CASES, ids=[f"{case[0]}-{case[2]!a:.60}" for case in CASES]
)
def test_what_cannot_be(reader: str, body: dict[str, Any], param: str, names: tuple[str, ...]) -> None:
    with pytest.raises(ApiError) as caught:
        READERS[reader](**body)
    error = caught.value.body["error"]
    assert (caught.value.status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert [name for name in names if name not in error["message"]] == [], error["message"]
    assert error["message"].isascii() and "\n" not in error["message"] and len(error["message"]) < 600
