"""What generation_config.json says about sampling: how a model's makers mean it to be used.

As in vLLM and transformers, these are the defaults of `hsai generate`; what the user says comes first.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hsai.data.assets import GENERATION_CONFIG
from hsai.errors import InputError
from hsai.infer.sampling import LOWEST_TEMPERATURE, SamplingConfig

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1, 1.0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "typical_p": (None, 1, 1.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "min_new_tokens": (None, 0),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "bad_words_ids": (None, []),
    "sequence_bias": (None, {}),
}
"""Settings that the sampler does not have, and the values that ask for nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Sampling as a model's makers mean it."""

    temperature: float = 0.0
    """0 unless they say that tokens are drawn (do_sample)."""

    top_k: int | None = None
    """As `SamplingConfig` has it."""

    top_p: float | None = None
    """As `SamplingConfig` has it."""

    min_p: float | None = None
    """As `SamplingConfig` has it."""

    max_tokens: int | None = None
    """New tokens at most; none if they do not say."""

    ignored: tuple[str, ...] = ()
    """Settings, such as repetition_penalty=1.1, that the sampler does not have."""

    def sampling(
        self, *, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None, seed: int = 0
    ) -> SamplingConfig:
        """These defaults where the user says nothing; at temperature 0 nothing of them is left.

        Raises:
          InputError: as `SamplingConfig`.
        """
        temperature = self.temperature if temperature is None else temperature
        if temperature == 0:
            return SamplingConfig(temperature=0.0, top_k=top_k, top_p=top_p, seed=seed)
        return SamplingConfig(
            temperature=temperature,
            top_k=self.top_k if top_k is None else top_k,
            top_p=self.top_p if top_p is None else top_p,
            min_p=self.min_p,
            seed=seed,
        )


def read_defaults(config: Mapping[str, Any]) -> GenerationDefaults:
    """The defaults in the content of a generation_config.json.

    Raises:
      InputError: a value is of another type, or out of range.
    """
    ignored = tuple(f"{name}={config[name]}" for name, none in _NEUTRAL.items() if config.get(name) not in none)
    max_tokens = _number(config, "max_new_tokens", int)
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"{GENERATION_CONFIG}: max_new_tokens={max_tokens} must be at least 1")
    temperature = _number(config, "temperature", float)
    temperature = 1.0 if temperature is None else temperature
    if config.get("do_sample") is not True or 0 <= temperature < LOWEST_TEMPERATURE:
        return GenerationDefaults(max_tokens=max_tokens, ignored=ignored)
    defaults = GenerationDefaults(
        temperature=temperature,
        top_k=_number(config, "top_k", int) or None,  # 0 keeps all
        top_p=_number(config, "top_p", float),
        min_p=_number(config, "min_p", float),
        max_tokens=max_tokens,
        ignored=ignored,
    )
    try:
        defaults.sampling()
    except InputError as error:
        raise InputError(f"{GENERATION_CONFIG}: {error}") from error
    return defaults


def _number(config: Mapping[str, Any], name: str, kind: type) -> Any:
    """The value of a setting, as `kind`; None if it is not there."""
    value = config.get(name)
    if value is None:
        return None
    if type(value) not in (int, kind):
        raise InputError(f"{GENERATION_CONFIG}: {name}={value!r} must be a number ({kind.__name__})")
    return kind(value)
