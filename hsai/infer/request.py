"""What is asked of the engine, and what it answers: requests go in, events come out, piece by piece."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.infer.sampling import SamplingConfig

FinishReason = Literal["end_of_text", "stop", "max_tokens", "context", "constraint", "cancelled", "failed"]
"""Why a text ended: the model ended it; it held a stop string; `max_tokens` were made; the context is full; the
constraint turned out, in the middle of the text, to be too large for its parser, whose words the log has; the request
was cancelled; or the engine failed, which is a defect and stands in the log."""

FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)

MOST_LOGPROBS = 20
"""Alternatives of a token whose probabilities can be asked for."""

MOST_STOPS = 16
LONGEST_STOP = 256
"""Stop strings a request may have, and the characters of one."""


@dataclasses.dataclass(frozen=True)
class JsonSchema:
    """The text is JSON that this schema accepts."""

    schema: str
    """JSON Schema, as JSON text; `{}` accepts any JSON."""


@dataclasses.dataclass(frozen=True)
class Regex:
    """The whole text matches this regular expression."""

    pattern: str
    """In the syntax of Rust's regex crate: no look-around, no back-references."""


Constraint = JsonSchema | Regex


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue.

    Raises:
      InputError: a value is out of range. Whether tokens, lengths and constraint suit a model, `Service.submit` tells.
    """

    tokens: tuple[int, ...]
    """The prompt, as it is: nothing is put before it."""

    max_tokens: int = 128
    """New tokens at most."""

    sampling: SamplingConfig = SamplingConfig()
    """How tokens are chosen."""

    stop: Sequence[str] = ()
    """The text ends before the first of these that it would hold."""

    logprobs: int | None = None
    """Gives the logarithm of each new token's probability, and of this many likeliest ones' in its place."""

    constraint: Constraint | None = None
    """What the text must be."""

    def __post_init__(self) -> None:
        if not self.tokens:
            raise InputError("the prompt has no tokens")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens={self.max_tokens} must be at least 1")
        if isinstance(self.stop, str):
            raise InputError(f"stop is the string {self.stop[:50]!r}; valid is a sequence of strings")
        if len(self.stop) > MOST_STOPS:
            raise InputError(f"stop has {len(self.stop)} strings; at most {MOST_STOPS} are valid")
        for text in self.stop:
            if not 1 <= len(text) <= LONGEST_STOP:
                raise InputError(f"stop: a string of {len(text)} characters; valid are 1 to {LONGEST_STOP}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise InputError(f"logprobs={self.logprobs} must be between 0 and {MOST_LOGPROBS}, or none")


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, as the model has it: before penalties, temperature and narrowings."""

    token: int
    """Its id."""

    logprob: float
    """Natural logarithm of its probability."""

    top: tuple[tuple[int, float], ...]
    """The likeliest tokens in its place and their logarithms, likeliest first: as many as were asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What a request took."""

    prompt_tokens: int
    """Tokens of the prompt."""

    cached_tokens: int
    """Those of the prompt that earlier requests had left in the cache, so that they were not read again."""

    new_tokens: int
    """Tokens that were made: the one that ended the text is not among them."""

    steps: int
    """Tokens that were made beyond the first, the one that ended the text included: those of `seconds_decode`."""

    drafted_tokens: int = 0
    """Tokens that speculation drafted."""

    accepted_tokens: int = 0
    """Those of them that became tokens of the text, or ended it."""

    seconds_queued: float
    """From the submission to the beginning."""

    seconds_prefill: float
    """From the beginning to the first token."""

    seconds_decode: float
    """From the first token to the last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """What became certain of a text since the event before."""

    text: str = ""
    """Whole characters; what may turn out to be a stop string is held back."""

    tokens: tuple[int, ...] = ()
    """New tokens, which may be ahead of the text."""

    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `tokens`, if they were asked for."""

    finish_reason: FinishReason | None = None
    """Why the text ended, in the last event only."""

    usage: Usage | None = None
    """In the last event only."""


def check_prompt(ids: Sequence[int], tokenizer: Tokenizer, slots: int) -> None:
    """Refuses a prompt that a model cannot read.

    Args:
      ids: the prompt.
      tokenizer: of the model.
      slots: tokens that the context holds.
    Raises:
      InputError: it has no tokens, more than the context holds, or one that the tokenizer does not have.
    """
    if len(ids) == 0:
        raise InputError(f"the prompt has no tokens; an empty text begins with token {tokenizer.eot}")
    if len(ids) > slots:
        raise InputError(f"the prompt has {len(ids)} tokens, and the context holds {slots}")
    for token in ids:
        if not 0 <= token < tokenizer.vocab_size:
            raise InputError(f"token id {token} is out of range; valid are 0 to {tokenizer.vocab_size - 1}")
