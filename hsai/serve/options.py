"""Fields that both ways to generate have, and those of OpenAI's that are refused because they would be faked."""

import abc
import dataclasses
import json
import secrets
from typing import Any, ClassVar

from hsai.infer import Engine
from hsai.infer.defaults import GenerationDefaults
from hsai.infer.request import LONGEST_STOP, MOST_STOPS, Constraint, JsonSchema
from hsai.infer.sampling import LOWEST_TEMPERATURE, SamplingConfig
from hsai.serve.answers import Answer
from hsai.serve.errors import refuse
from hsai.serve.fields import Fields, check_text, show

HOTTEST = 2.0
"""The largest temperature, as of OpenAI."""

PENALTIES = (0.1, 10.0)
"""The least and the largest repetition_penalty; useful ones are near 1, and far from it logits leave float32."""

SEEDS = (-(2**63), 2**63 - 1)
"""The least and the largest seed, as of OpenAI."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How the text is to be made and sent."""

    sampling: SamplingConfig
    """How tokens are chosen."""

    stop: tuple[str, ...]
    """As of `hsai.infer.request.Request`."""

    constraint: Constraint | None
    """As of `hsai.infer.request.Request`."""

    stream: bool
    """Whether the text is sent as it comes."""

    include_usage: bool
    """Whether a stream ends with what was used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted(abc.ABC):
    """What a request to generate asks for.

    Attributes:
      form: of its answer.
      prompt_field: the field that the prompt is made from.
    """

    form: ClassVar[type[Answer]]
    prompt_field: ClassVar[str]

    model: str
    """Which is meant to answer."""

    max_tokens: int | None
    """New tokens at most; none leaves it to the context."""

    logprobs: int | None
    """As of `hsai.infer.request.Request`."""

    options: Options
    """How the text is to be made and sent."""

    @abc.abstractmethod
    def encode(self, engine: Engine) -> list[int]:
        """The tokens of the prompt.

        Raises:
          InputError: what the engine refuses.
        """


def read_options(fields: Fields, defaults: GenerationDefaults) -> Options:
    """Reads them.

    Args:
      fields: of the body.
      defaults: of the model, where the body says nothing.
    Raises:
      ApiError: a value of another type, out of range, or not supported.
    """
    fields.only("n", (1,), "one answer a request is made")
    for penalty in ("presence_penalty", "frequency_penalty"):
        fields.only(penalty, (0,), "it is not supported; repetition_penalty is")
    fields.only("logit_bias", ({},), "it is not supported")
    for name in ("user", "safety_identifier", "prompt_cache_key", "service_tier"):
        fields.text(name)
    fields.pairs("metadata")
    stream = fields.flag("stream")
    return Options(
        sampling=_read_sampling(fields, defaults),
        stop=_read_stop(fields),
        constraint=_read_constraint(fields),
        stream=stream,
        include_usage=_read_include_usage(fields, stream),
    )


def read_length(fields: Fields, *names: str) -> int | None:
    """How many tokens are made at most, said under any one of the names."""
    said = {name: value for name in names if (value := fields.integer(name, 1)) is not None}
    if len(set(said.values())) > 1:
        message = f"{' and '.join(f'{name}={value}' for name, value in said.items())} say the same in two ways"
        raise refuse(names[0], f"{message}; valid is one of them")
    return next(iter(said.values()), None)


def _read_sampling(fields: Fields, defaults: GenerationDefaults) -> SamplingConfig:
    """At temperature 0, what narrows the choice is dropped: it always leaves the likeliest token.

    A temperature that the sampler takes for 0, and a share of 0, ask for the likeliest token, too.
    """
    temperature = fields.number("temperature", 0, HOTTEST)
    narrowing: dict[str, Any] = {
        "top_k": fields.integer("top_k", 1),
        "top_p": fields.number("top_p", 0, 1),
        "min_p": fields.number("min_p", 0, 1),
    }
    penalty = fields.number("repetition_penalty", *PENALTIES)
    seed = fields.integer("seed", *SEEDS)
    seed = secrets.randbits(32) if seed is None else _fold_seed(seed)
    if narrowing["top_p"] == 0 or (temperature is not None and temperature < LOWEST_TEMPERATURE):
        temperature = 0.0
    if (defaults.temperature if temperature is None else temperature) == 0:
        narrowing = {}
    return defaults.sampling(temperature=temperature, repetition_penalty=penalty, seed=seed, **narrowing)


def _fold_seed(seed: int) -> int:
    """The 32 bits that the sampler has: those below 2^32 are themselves."""
    return (seed ^ seed >> 32) & 0xFFFFFFFF if not 0 <= seed < 2**32 else seed


def _read_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    if value is None:
        return ()
    texts = value if isinstance(value, list) else [value]
    if len(texts) > MOST_STOPS:
        raise refuse("stop", f"stop has {len(texts)} strings; at most {MOST_STOPS} are valid")
    for text in texts:
        if not 1 <= len(check_text(text, "stop")) <= LONGEST_STOP:
            raise refuse("stop", f"stop: a string of {len(text)} characters; valid are 1 to {LONGEST_STOP}")
    return tuple(texts)


def _read_include_usage(fields: Fields, stream: bool) -> bool:
    value = fields.take("stream_options")
    if value is None:
        return False
    if not stream:
        raise refuse("stream_options", "stream_options need stream=true")
    options = Fields(value, "stream_options")
    options.only("include_obfuscation", (False,), "it is not supported")
    include = options.flag("include_usage")
    options.finish()
    return include


def _read_constraint(fields: Fields) -> Constraint | None:
    value = fields.take("response_format")
    if value is None:
        return None
    form = Fields(value, "response_format")
    kind = form.choice("type", ("text", "json_object", "json_schema"))
    constraint: Constraint | None = None
    if kind == "json_object":
        constraint = JsonSchema('{"type": "object"}')
    elif kind == "json_schema":
        described = Fields(form.demand(form.take("json_schema"), "json_schema"), "response_format.json_schema")
        for name in ("name", "description"):
            described.text(name)
        described.flag("strict")
        schema = described.demand(described.take("schema"), "schema")
        described.finish()
        if not isinstance(schema, dict):
            path = described.path("schema")
            raise refuse(path, f"{path} must be an object, and is {show(schema)}", code="invalid_type")
        constraint = JsonSchema(json.dumps(schema))
    form.finish()
    return constraint
