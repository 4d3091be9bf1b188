"""Who drafts for a model: which one a user asks for, and its compiled programs beside those of the model's runtime.

speculation.py says what a draft is, and why it changes no text.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export.source import open_model
from hsai.export.stablehlo import GraphConfig
from hsai.infer.choose import Kind
from hsai.infer.programs import Made, Rows, Vocabulary
from hsai.infer.row import Row
from hsai.infer.runtime import Runtime, TracedRuntime, make_rows, make_table, plan_buckets
from hsai.infer.speculation import make_speculating_write
from hsai.models import KVCache, Transformer

LOOKUP = "lookup"
"""Asks for prompt lookup; anything else is the path of a draft model."""

DRAFTS, MOST_DRAFTS = 4, 16
"""Tokens that are drafted at a time where nobody says how many, and at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafting:
    """Who drafts, and how much.

    Raises:
      InputError: a number of tokens out of range.
    """

    model: Transformer | None = None
    """Of the same tokenizer; none looks up what followed in the row's own tokens."""

    tokens: int = DRAFTS
    """K: drafted in a step at most."""

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= MOST_DRAFTS:
            raise InputError(f"draft_tokens={self.tokens} must be between 1 and {MOST_DRAFTS}")


def open_drafting(
    speculate: str | os.PathLike[str],
    tokens: int,
    *,
    target: str | os.PathLike[str],
    tokenizer: Tokenizer,
) -> Drafting:
    """Reads the draft model, if one is asked for.

    Args:
      speculate: `LOOKUP`, or a model (`hsai.export.source.open_model`).
      tokens: as of `Drafting`.
      target: the model that it drafts for, to be named.
      tokenizer: of that model.
    Raises:
      InputError: as `Drafting` and `open_model`; another tokenizer than the target's.
    """
    if speculate == LOOKUP:
        return Drafting(tokens=tokens)
    Drafting(tokens=tokens)  # before weights are read in vain
    source = open_model(speculate)
    if not source.tokenizer.equals(tokenizer):
        raise InputError(
            f"the draft model {os.fspath(speculate)} has another tokenizer than {os.fspath(target)}: "
            "a draft is of the same tokens, as the same model has with other weights"
        )
    return Drafting(model=source.model, tokens=tokens)


class Speculator(Protocol):
    """Writes blocks with drafts into pages of a `hsai.infer.runtime.Runtime`, and reads with the draft model."""

    drafts: int
    """K."""

    def make_pages(self, count: int) -> KVCache | None:
        """As many pages for a draft model as the runtime has; None if there is no such model."""

    def read(self, tokens: np.ndarray, start: int, table: np.ndarray, pages: KVCache) -> KVCache:
        """Reads a chunk of a row with the draft model, of any length, as `Runtime.read` does with the other."""

    def prepare_read(self, tokens: int, pages: KVCache) -> None:
        """Compiles what reading a chunk of so many tokens needs."""

    def write(
        self, rows: Rows, steps: int, kind: Kind, vocabulary: Vocabulary, pages: KVCache, draft_pages: KVCache | None
    ) -> tuple[Made, KVCache, KVCache | None]:
        """Makes tokens, as `hsai.infer.speculation.make_speculating_write` says. Waits for them."""

    def prepare_write(
        self, batch: int, kind: Kind, vocabulary: Vocabulary, pages: KVCache, draft_pages: KVCache | None
    ) -> None:
        """Compiles what writing blocks of B rows needs."""


class TracedSpeculator:
    """A `Speculator` of programs that are traced here."""

    def __init__(self, target: TracedRuntime, drafting: Drafting) -> None:
        """For the model of `target`, whose context, pages and buckets a draft model gets too.

        Raises:
          InputError: a draft model of a shorter context.
        """
        self.drafts = drafting.tokens
        self._target = target
        self._draft: TracedRuntime | None = None
        if drafting.model is not None:
            longest = drafting.model.config.max_length
            if longest < target.slots:
                raise InputError(f"the draft model reads {longest} tokens at most, and the context is {target.slots}")
            graphs = GraphConfig(prefill_buckets=target.buckets, context=target.slots, cache=target.cache)
            self._draft = TracedRuntime(drafting.model, graphs, page=target.page)
        self._programs: dict[Any, Callable[..., Any]] = {}

    def make_pages(self, count: int) -> KVCache | None:
        """As of `Speculator`."""
        return None if self._draft is None else self._draft.make_pages(count)

    def read(self, tokens: np.ndarray, start: int, table: np.ndarray, pages: KVCache) -> KVCache:
        """As of `Speculator`."""
        assert self._draft is not None, "pages are a draft model's"
        return self._draft.read(tokens, start, table, pages)

    def prepare_read(self, tokens: int, pages: KVCache) -> None:
        """As of `Speculator`."""
        assert self._draft is not None, "pages are a draft model's"
        self._draft.prepare_read(tokens, pages)

    def write(
        self, rows: Rows, steps: int, kind: Kind, vocabulary: Vocabulary, pages: KVCache, draft_pages: KVCache | None
    ) -> tuple[Made, KVCache, KVCache | None]:
        """As of `Speculator`."""
        program = self._compile(len(rows.tokens), kind, vocabulary, pages, draft_pages)
        weights = None if self._draft is None else self._draft.weights
        made, pages, draft_pages = program(self._target.weights, weights, rows, np.int32(steps), pages, draft_pages)
        return jax.device_get(made), pages, draft_pages

    def prepare_write(
        self, batch: int, kind: Kind, vocabulary: Vocabulary, pages: KVCache, draft_pages: KVCache | None
    ) -> None:
        """As of `Speculator`."""
        self._compile(batch, kind, vocabulary, pages, draft_pages)

    def _compile(
        self, batch: int, kind: Kind, vocabulary: Vocabulary, pages: KVCache, draft_pages: KVCache | None
    ) -> Callable[..., Any]:
        key = (batch, kind, vocabulary, pages.keys.shape)
        if key not in self._programs:
            draft = None if self._draft is None else self._draft.described
            step = make_speculating_write(self._target.described, draft, vocabulary, kind, self.drafts)
            rows = make_rows([], batch, self._target.width, pages.keys.shape[1])
            history = np.zeros((batch, self._target.slots), np.int32)
            rows = dataclasses.replace(rows, history=history)  # type: ignore[arg-type]  # numpy's
            weights = None if self._draft is None else self._draft.weights
            lowered = jax.jit(step, donate_argnames=("pages", "draft_pages")).lower(
                self._target.weights, weights, rows, np.int32(1), pages, draft_pages
            )
            self._programs[key] = lowered.compile()
        return self._programs[key]


class DraftPages:
    """A scheduler's drafts: what the draft model, if there is one, has read of each row, in pages of its own.

    Attributes:
      most: K.
    """

    def __init__(self, speculator: Speculator, runtime: Runtime, count: int) -> None:
        """With as many pages as the scheduler has of `runtime`, in the places that the rows' tables say."""
        self.most = speculator.drafts
        self._speculator, self._runtime, self._count = speculator, runtime, count
        self._pages = speculator.make_pages(count)

    def prepare_read(self, tokens: int) -> None:
        """Compiles what reading so many tokens needs."""
        if self._pages is not None:
            for bucket in plan_buckets(tokens, self._runtime.buckets):
                self._speculator.prepare_read(bucket, self._pages)

    def prepare_write(self, batch: int, kind: Kind, vocabulary: Vocabulary, pages: KVCache) -> None:
        """As of `Speculator`."""
        self._speculator.prepare_write(batch, kind, vocabulary, pages, self._pages)

    def follow(self, row: Row, read: int) -> None:
        """Reads a row as far as it is not yet: `read` of its tokens."""
        if self._pages is None:
            return
        for bucket in plan_buckets(read - row.followed, self._runtime.buckets):
            tokens = np.asarray(row.tokens[row.followed : min(row.followed + bucket, read)], np.int32)
            table = make_table([row.pages], 1, self._runtime.width, self._count)
            self._pages = jax.block_until_ready(self._speculator.read(tokens, row.followed, table, self._pages))
            row.followed += len(tokens)

    def show(self, arrays: Rows, rows: Sequence[Row]) -> Rows:
        """The arrays of `rows` with what drafts are made of; a draft model has read it."""
        history = np.zeros((len(arrays.tokens), self._runtime.slots), np.int32)
        for line, row in zip(history, rows, strict=False):
            self.follow(row, row.read - 1)
            row.fill_history(line)
        return dataclasses.replace(arrays, history=history)  # type: ignore[arg-type]  # numpy's

    def write(self, rows: Rows, steps: int, kind: Kind, vocabulary: Vocabulary, pages: KVCache) -> tuple[Made, KVCache]:
        """As of `Speculator`."""
        made, pages, self._pages = self._speculator.write(rows, steps, kind, vocabulary, pages, self._pages)
        return made, pages
