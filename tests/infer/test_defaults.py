"""What generation_config.json asks for, and what a user says instead."""

from typing import Any

import pytest

from hsai.errors import InputError
from hsai.infer import SamplingConfig
from hsai.infer.defaults import GenerationDefaults, read_defaults

LLAMA = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2], "transformers_version": "4.45"}


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        ({}, SamplingConfig()),
        (LLAMA, SamplingConfig(temperature=0.6, top_p=0.9)),
        (LLAMA | {"do_sample": False}, SamplingConfig()),
        ({"do_sample": True}, SamplingConfig(temperature=1.0)),
        ({"do_sample": True, "temperature": 0}, SamplingConfig()),
        ({"do_sample": True, "temperature": 1e-9, "top_k": 5}, SamplingConfig()),
        ({"do_sample": True, "top_k": 0, "min_p": 0.1}, SamplingConfig(temperature=1.0, min_p=0.1)),
        ({"repetition_penalty": 1.2, "top_k": 5}, SamplingConfig(repetition_penalty=1.2)),
        (LLAMA | {"repetition_penalty": 1}, SamplingConfig(temperature=0.6, top_p=0.9)),
        (
            LLAMA | {"repetition_penalty": 1.1},
            SamplingConfig(temperature=0.6, top_p=0.9, repetition_penalty=1.1),
        ),
        ({"do_sample": True, "top_k": 20, "top_p": 1}, SamplingConfig(temperature=1.0, top_k=20, top_p=1.0)),
    ],
)
def test_sampling_is_that_of_the_config(config: dict[str, Any], sampling: SamplingConfig) -> None:
    assert read_defaults(config).sampling() == sampling


def test_what_the_user_says_comes_first() -> None:
    defaults = read_defaults(LLAMA | {"max_new_tokens": 9})
    assert defaults.max_tokens == 9
    assert defaults.sampling(temperature=0.0) == SamplingConfig()
    assert defaults.sampling(min_p=0.1, repetition_penalty=1.5) == SamplingConfig(
        temperature=0.6, top_p=0.9, min_p=0.1, repetition_penalty=1.5
    )
    punishing = read_defaults({"repetition_penalty": 1.3})
    assert punishing.sampling().repetition_penalty == 1.3
    assert punishing.sampling(temperature=0.0).repetition_penalty == 1.0
    assert punishing.sampling(temperature=0.5, repetition_penalty=1.1).repetition_penalty == 1.1
    assert defaults.sampling(temperature=0.2, seed=3) == SamplingConfig(temperature=0.2, top_p=0.9, seed=3)
    assert defaults.sampling(top_k=4, top_p=0.5) == SamplingConfig(temperature=0.6, top_k=4, top_p=0.5)
    with pytest.raises(InputError, match="top_k=3 has no effect at temperature=0"):
        defaults.sampling(temperature=0.0, top_k=3)
    with pytest.raises(InputError, match="top_k=3 has no effect at temperature=0"):
        GenerationDefaults().sampling(top_k=3)


def test_what_the_sampler_does_not_have_is_told() -> None:
    config = {"repetition_penalty": 1.05, "typical_p": 1.0, "num_beams": 2, "no_repeat_ngram_size": 3}
    assert read_defaults(config).ignored == ("no_repeat_ngram_size=3", "num_beams=2")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": "hot"}, "generation_config.json: temperature='hot' must be a number"),
        ({"do_sample": True, "top_k": 2.5}, "generation_config.json: top_k=2.5 must be a number"),
        ({"do_sample": True, "top_p": True}, "generation_config.json: top_p=True must be a number"),
        ({"do_sample": True, "temperature": -1}, "generation_config.json: temperature=-1.0 must be 0"),
        ({"do_sample": True, "top_p": 2}, "generation_config.json: top_p=2.0 must be above 0"),
        ({"repetition_penalty": -1}, "generation_config.json: repetition_penalty=-1.0 must be positive"),
        ({"max_new_tokens": 0}, "generation_config.json: max_new_tokens=0 must be at least 1"),
    ],
)
def test_values_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_defaults(config)
