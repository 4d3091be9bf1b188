"""Answers in OpenAI's forms: as a whole, and in chunks as they come.

An object of either form is written from events alone: the chunks of a stream, and the one event that they make.
"""

import abc
import codecs
import time
import uuid
from collections.abc import Iterator
from typing import Any

from hsai.data.tokenizer import Tokenizer
from hsai.infer.request import Event, TokenLogprob, Usage

FINISH_REASONS = {"end_of_text": "stop", "stop": "stop", "max_tokens": "length", "context": "length"}
"""OpenAI's words for ours; the others are errors."""

LOWEST_LOGPROB = -9999.0
"""OpenAI's word for a probability that is none: JSON has no infinity."""


class Answer(abc.ABC):
    """The forms of one answer."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, tokenizer: Tokenizer, *, logprobs: bool, include_usage: bool = False) -> None:
        """Begins an answer now.

        Args:
          model: its name.
          tokenizer: which says what tokens stand for.
          logprobs: whether they were asked for.
          include_usage: whether a stream ends with what was used.
        """
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, event: Event) -> dict[str, Any]:
        """The answer whose only event is `event`."""
        assert event.finish_reason is not None and event.usage is not None, "only the last event is whole"
        choice = self._choice(self._message(event.text), event) | {"finish_reason": FINISH_REASONS[event.finish_reason]}
        return self._head | {
            "object": self.whole_object,
            "choices": [choice],
            "usage": describe_usage(event.usage),
        }

    def begin(self) -> Iterator[dict[str, Any]]:
        """Chunks before the first event."""
        yield from ()

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """Those that an event makes: its text, then its end, then what was used."""
        if event.text or (self._logprobs and event.logprobs):
            yield self._chunk(self._choice(self._delta(event.text), event))
        if event.finish_reason is not None:
            yield self._chunk(self._choice(self._delta(""), None), FINISH_REASONS[event.finish_reason])
            if self._include_usage:
                assert event.usage is not None, "the last event has it"
                yield self._head | {
                    "object": self.chunk_object,
                    "choices": [],
                    "usage": describe_usage(event.usage),
                }

    def _chunk(self, choice: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choices = [choice | {"finish_reason": finish_reason}]
        usage = {"usage": None} if self._include_usage else {}
        return self._head | {"object": self.chunk_object, "choices": choices} | usage

    def _choice(self, content: dict[str, Any], event: Event | None) -> dict[str, Any]:
        """The only choice, with the logprobs of an event."""
        logprobs = self._describe_logprobs(event.logprobs) if self._logprobs and event is not None else None
        return {"index": 0, **content, "logprobs": logprobs}

    @abc.abstractmethod
    def _message(self, text: str) -> dict[str, Any]:
        """What holds the whole text."""

    @abc.abstractmethod
    def _delta(self, text: str) -> dict[str, Any]:
        """What holds a piece of it; "" stands for the end."""

    @abc.abstractmethod
    def _describe_logprobs(self, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        """Those of new tokens."""

    def _text(self, token: int) -> str:
        """What a token stands for alone, as far as that is text; a special token's name."""
        return self._tokenizer.decode_bytes([token]).decode(errors="replace") or self._tokenizer.name(token)


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self) -> Iterator[dict[str, Any]]:
        """The role, with no text yet."""
        delta = {"role": "assistant", "content": ""}
        yield self._chunk(self._choice({"delta": delta}, None))

    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _describe_logprobs(self, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        entries = []
        for found in logprobs:
            top = [self._entry(token, logprob) for token, logprob in found.top]
            entries.append(self._entry(found.token, found.logprob) | {"top_logprobs": top})
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.decode_bytes([token])
        return {"token": self._text(token), "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(data)}


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, *, logprobs: bool, include_usage: bool = False) -> None:
        """As `Answer`."""
        super().__init__(model, tokenizer, logprobs=logprobs, include_usage=include_usage)
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def _message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _describe_logprobs(self, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        """In parallel lists; where each token's text begins, too."""
        offsets, tops = [], []
        for found in logprobs:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.decode_bytes([found.token])))
            top: dict[str, float] = {}
            for token, value in found.top:  # the likeliest first, which stays where another has its name
                top.setdefault(self._name(token), max(value, LOWEST_LOGPROB))
            tops.append(top)
        return {
            "tokens": [self._name(found.token) for found in logprobs],
            "token_logprobs": [max(found.logprob, LOWEST_LOGPROB) for found in logprobs],
            "top_logprobs": tops if any(tops) else None,
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        """As `_text`; what is no text alone, a part of a character, as OpenAI names it: `bytes:\\xe2\\x82`."""
        data = self._tokenizer.decode_bytes([token])
        try:
            return data.decode() or self._text(token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def describe_usage(usage: Usage) -> dict[str, Any]:
    """What a request took."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.new_tokens,
        "total_tokens": usage.prompt_tokens + usage.new_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
