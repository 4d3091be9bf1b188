"""Constrained texts: whatever the model would rather say, a schema or an expression is followed; and what cannot be."""

import json
import re

import numpy as np
import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.infer import Engine, JsonSchema, Regex, SamplingConfig
from hsai.infer.constraint import LONGEST, Guide
from hsai.infer.request import Constraint

SCHEMA = """{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy", "数"]}},
"required": ["a", "b"], "additionalProperties": false}"""


@pytest.fixture(scope="module")
def guide(tokenizer: Tokenizer) -> Guide:
    return Guide(tokenizer)


def walk(guide: Guide, tokenizer: Tokenizer, constraint: Constraint, seed: int) -> str | None:
    """A text of allowed tokens, taken blindly; None if it does not end in time."""
    rng = np.random.default_rng(seed)
    follower = guide.follow(constraint)
    tokens: list[int] = []
    while len(tokens) < 300:
        bits = np.unpackbits(follower.allowed.view(np.uint8), bitorder="little")[: tokenizer.vocab_size]
        token = int(rng.choice(np.flatnonzero(bits)))
        if token in tokenizer.stops:
            return tokenizer.decode(tokens)
        tokens.append(token)
        follower.push(token)
        if follower.ended:
            return tokenizer.decode(tokens)
    return None


@pytest.mark.parametrize("pattern", ["[a-c]{3,5}-[0-9]+", "ab+c", "(héron|数据|😀 ?){1,4}", "x?"])
def test_every_allowed_text_matches_the_expression(pattern: str, guide: Guide, tokenizer: Tokenizer) -> None:
    texts = [walk(guide, tokenizer, Regex(pattern), seed) for seed in range(20)]
    assert all(re.fullmatch(pattern, text) for text in texts if text is not None)
    assert len({text for text in texts if text is not None}) > 1


def test_every_allowed_text_fits_the_schema(guide: Guide, tokenizer: Tokenizer) -> None:
    texts = [text for seed in range(20) if (text := walk(guide, tokenizer, JsonSchema(SCHEMA), seed))]
    found = [json.loads(text) for text in texts]
    assert all(set(value) == {"a", "b"} and isinstance(value["a"], int) for value in found)
    assert {value["b"] for value in found} == {"x", "yy", "数"}


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [(("ba",), "a", "stop"), (("abx", "ababx"), "ababab", "end_of_text"), (("bab", "aba"), "", "stop")],
)
def test_a_stop_string_ends_a_text_that_follows(stop: tuple[str, ...], text: str, reason: str, engine: Engine) -> None:
    done = engine.generate("def", max_tokens=30, constraint=Regex("ababab"), stop=stop, logprobs=0)
    assert (done.text, done.finish_reason) == (text, reason)


def test_an_engine_follows(engine: Engine) -> None:
    """Greedy and drawn, in one place with what else the full program does; the text ends where it must."""
    sampling = SamplingConfig(temperature=1.5, seed=2, repetition_penalty=1.2)
    done = engine.generate("def", max_tokens=30, sampling=sampling, constraint=Regex("(ab|cd){3}"), logprobs=1)
    assert re.fullmatch("(ab|cd){3}", done.text) and done.finish_reason == "end_of_text"
    assert len(done.logprobs) == len(done.tokens) >= 1
    greedy = engine.generate("def", max_tokens=30, constraint=Regex("[0-9]{4}"))
    assert re.fullmatch("[0-9]{4}", greedy.text)
    cut = engine.generate("def", max_tokens=2, constraint=Regex("[0-9]{4}"))
    assert cut.finish_reason == "max_tokens" and greedy.text.startswith(cut.text)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Regex("(a"), "the regular expression cannot be used: .*unclosed group"),
        (Regex("(?=a)b"), "the regular expression cannot be used: .*look-around"),
        (Regex("a" * (LONGEST + 1)), f"has {LONGEST + 1} characters; at most {LONGEST} are valid"),
        (JsonSchema('{"type": "objec"}'), "the JSON schema cannot be used: Invalid type: objec"),
        (JsonSchema('{"not": {"type": "string"}}'), "the JSON schema cannot be used: Unimplemented keys"),
        (JsonSchema("{"), "the JSON schema is not JSON"),
        (JsonSchema("[" * 30000), "the JSON schema is not JSON"),
        (JsonSchema('{"const": "\udce9"}'), "the JSON schema is not valid UTF-8 at character 11"),
        (Regex("a\udce9"), "the regular expression is not valid UTF-8 at character 1"),
        (JsonSchema("3"), "the JSON schema is int, not an object"),
    ],
)
def test_what_cannot_be_followed_is_refused(constraint: Constraint, message: str, guide: Guide) -> None:
    with pytest.raises(InputError, match=message) as caught:
        guide.follow(constraint)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
