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

    repetition_penalty: float = 1.0
    """As `SamplingConfig` has it; holds where nothing is drawn, too."""

    max_tokens: int | None = None
    """New tokens at most; none if they do not say."""

    ignored: tuple[str, ...] = ()
    """Settings, such as no_repeat_ngram_size=3, that the sampler does not have."""

    def sampling(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
    ) -> SamplingConfig:
        """These defaults where the user says nothing; to one who asks for temperature 0 nothing of them is left.

        Raises:
          InputError: as `SamplingConfig`.
        """
        own = GenerationDefaults() if temperature == 0 else self
        temperature = own.temperature if temperature is None else temperature
        if temperature == 0:
            own = GenerationDefaults(repetition_penalty=own.repetition_penalty)
        return SamplingConfig(
            repetition_penalty=own.repetition_penalty if repetition_penalty is None else repetition_penalty,
            temperature=temperature,
            top_k=own.top_k if top_k is None else top_k,
            top_p=own.top_p if top_p is None else top_p,
            min_p=own.min_p if min_p is None else min_p,
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
    penalty = _number(config, "repetition_penalty", float)
    defaults = GenerationDefaults(
        repetition_penalty=1.0 if penalty is None else penalty, max_tokens=max_tokens, ignored=ignored
    )
    if config.get("do_sample") is True and not 0 <= temperature < LOWEST_TEMPERATURE:
        defaults = dataclasses.replace(
            defaults,
            temperature=temperature,
            top_k=_number(config, "top_k", int) or None,  # 0 keeps all
            top_p=_number(config, "top_p", float),
            min_p=_number(config, "min_p", float),
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
