"""Texts that a JSON schema or a regular expression accepts: which tokens may come next.

The work is done by llguidance, the library behind this in vLLM, SGLang and llama.cpp: it follows the text with a parser
over the bytes of all tokens, and gives a bit for each token that some accepted text goes on with. A text may end where
it is accepted, and ends by itself where nothing but the end may follow.
"""

import functools
import json
import threading
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.infer.request import Constraint, JsonSchema

LONGEST = 1 << 16
"""Characters of a schema or an expression."""


class GuideFailed(Exception):
    """The parser gave up in the middle of a text: the grammar, or the text, is too large for it."""


class Guide:
    """Follows constraints over one tokenizer, which it indexes once, when it is first needed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def follow(self, constraint: Constraint) -> "Follower":
        """A follower at the beginning of a text.

        Raises:
          InputError: the schema or the expression cannot be used.
        """
        grammar = _describe(constraint)
        with self._lock:  # which threads share
            index = self._index
        matcher = llguidance.LLMatcher(index, grammar, log_level=0)
        try:
            return Follower(matcher, self._tokenizer.vocab_size)
        except GuideFailed as error:
            fault = " ".join(str(error).split("<state>")[0].split())
            raise InputError(f"constraint: {_name(constraint)} cannot be used: {fault[:300]}") from error

    @functools.cached_property
    def _index(self) -> llguidance.LLTokenizer:
        stops = sorted(self._tokenizer.stops)
        wrapped = llguidance.TokenizerWrapper(_Described(self._tokenizer))
        return llguidance.LLTokenizer(wrapped, n_vocab=self._tokenizer.vocab_size, eos_token=stops)


class Follower:
    """One text under a constraint.

    Attributes:
      allowed: uint32 (ceil(V / 32),): a bit for each token that may come next, those that end the text included.
      ended: whether nothing may follow but the end of the text.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocab: int) -> None:
        self._matcher = matcher
        self._words = -(-vocab // 32)
        self._look()

    def push(self, token: int) -> None:
        """Goes on with a token that was allowed.

        Raises:
          GuideFailed: as it says.
        """
        self._matcher.consume_token(token)
        self._look()

    def _look(self) -> None:
        if self._matcher.is_error():
            raise GuideFailed(self._matcher.get_error())
        self.ended = bool(self._matcher.is_stopped())
        if not self.ended:
            self.allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]
        if self._matcher.is_error():
            raise GuideFailed(self._matcher.get_error())


class _Described:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = range(tokenizer.vocab_size)
        self.eos_token_id = tokenizer.eot
        self.bos_token_id = None
        self.special_token_ids = [index for index in ids if tokenizer.token_bytes[index] == 0]
        special = set(self.special_token_ids)
        self.tokens: Sequence[bytes] = [
            tokenizer.name(index).encode() if index in special else tokenizer.decode_bytes([index]) for index in ids
        ]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode())


def _name(constraint: Constraint) -> str:
    return "the JSON schema" if isinstance(constraint, JsonSchema) else "the regular expression"


def _describe(constraint: Constraint) -> str:
    """The grammar, in llguidance's own words."""
    text = constraint.schema if isinstance(constraint, JsonSchema) else constraint.pattern
    if len(text) > LONGEST:
        raise InputError(f"constraint: {_name(constraint)} has {len(text)} characters; at most {LONGEST} are valid")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"constraint: {_name(constraint)} is not valid UTF-8 at character {error.start}") from error
    if not isinstance(constraint, JsonSchema):
        grammar: str = llguidance.LLMatcher.grammar_from_regex(text)
        return grammar
    try:
        schema: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"constraint: the JSON schema is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise InputError(f"constraint: the JSON schema is {type(schema).__name__}, not an object")
    grammar = llguidance.LLMatcher.grammar_from_json_schema(text)
    return grammar
