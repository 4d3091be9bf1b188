"""The model on the device: compiled programs and the weights they run on, over pages that the caller keeps.

There are two ways to a program: trace the model here, with the kernels of this machine, for many rows over many pages
(below); or take the graphs that the bundle ships, for one row in one page as long as the context (graphs.py).
Everything above is written once, over what they share.

B rows, T tokens of a chunk, P pages, M pages of a row, R tokens of a page.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hsai.export.stablehlo import GraphConfig
from hsai.formats.storage import describe, named_arrays
from hsai.infer.choose import Extras, Kind, stack_settings
from hsai.infer.programs import Made, Rows, Vocabulary, make_read, make_write
from hsai.infer.sampling import SamplingConfig
from hsai.models import KVCache, Transformer
from hsai_kernels.memory import allocate

PAGE = 64
"""R: what the CPU's attention takes at a time, and little enough for prompts to share their beginnings."""

SHORTEST = 8
"""Tokens of the smallest chunk: what follows a beginning that is in the cache is often short."""

BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Rows that a block is padded to."""


class Runtime(Protocol):
    """Reads tokens into pages, and writes the tokens that follow."""

    slots: int
    """Tokens that the context of a row holds."""

    page: int
    """R."""

    width: int
    """M: pages of a row as long as the context."""

    buckets: tuple[int, ...]
    """Ascending numbers of tokens that a chunk of a prompt is padded to."""

    batches: tuple[int, ...]
    """Ascending numbers of rows that a block is padded to."""

    def make_pages(self, count: int) -> KVCache:
        """P pages which hold nothing."""

    def read(self, tokens: np.ndarray, start: int, table: np.ndarray, pages: KVCache) -> KVCache:
        """Reads a chunk of a prompt.

        Args:
          tokens: int32 (T,), at most those of the largest bucket.
          start: how many tokens stand before it, in the row's pages.
          table: int32 (1, M): the row's pages, with places for all of these; P where it has none.
          pages: is used up.
        """

    def write(
        self, rows: Rows, extras: Extras | None, steps: int, kind: Kind, vocabulary: Vocabulary, pages: KVCache
    ) -> tuple[Made, KVCache]:
        """Makes tokens, as `hsai.infer.programs.make_write` says; B is one of `batches`. Waits for them."""

    def prepare_read(self, tokens: int, pages: KVCache) -> None:
        """Compiles what reading a chunk of so many tokens needs, so that timings hold no compilation."""

    def prepare_write(self, batch: int, kind: Kind, vocabulary: Vocabulary, pages: KVCache) -> None:
        """Compiles what writing blocks of B rows needs."""


class TracedRuntime:
    """A `Runtime` of programs that are traced here, and compiled when they are first needed.

    Attributes:
      described: the model's config, and the formats of its weights.
      weights: its arrays by name.
      cache: what pages store their numbers as.
    """

    def __init__(self, model: Transformer, graphs: GraphConfig, *, page: int = PAGE) -> None:
        """For `model` in the context and cache format that `graphs` says, and pages of `page` tokens.

        Prompts are read in its prefill buckets, and one of `SHORTEST`.

        Raises:
          InputError: a context beyond the model's.
        """
        self._model = jax.eval_shape(lambda: model)
        self.described = (model.config, describe(model))
        self.weights = named_arrays(model)
        self.cache = graphs.cache
        self.slots = graphs.slots(model.config)
        self.buckets = tuple(sorted({min(SHORTEST, self.slots), *graphs.buckets(model.config)}))
        self.page = min(page, self.slots)
        self.width = -(-self.slots // self.page)
        self.batches: tuple[int, ...] = BATCHES
        self._programs: dict[Any, Callable[..., Any]] = {}

    def make_pages(self, count: int) -> KVCache:
        """As of `Runtime`; memory that is not written yet costs none."""
        shapes = jax.eval_shape(lambda: self._model.make_cache(count, self.page, self.cache))
        make = jax.jit(lambda: jax.tree.map(allocate, shapes))
        pages: KVCache = make()
        return pages

    def read(self, tokens: np.ndarray, start: int, table: np.ndarray, pages: KVCache) -> KVCache:
        """As of `Runtime`."""
        bucket = _fit(len(tokens), self.buckets)
        padded = np.zeros((1, bucket), np.int32)
        padded[0, : len(tokens)] = tokens
        read: KVCache = self._compile_read(bucket, pages)(
            self.weights, padded, np.int32(start), np.int32(len(tokens)), table, pages
        )
        return read

    def write(
        self, rows: Rows, extras: Extras | None, steps: int, kind: Kind, vocabulary: Vocabulary, pages: KVCache
    ) -> tuple[Made, KVCache]:
        """As of `Runtime`."""
        program = self._compile_write(len(rows.tokens), kind, vocabulary, pages)
        made, pages = program(self.weights, rows, extras, np.int32(steps), pages)
        return jax.device_get(made), pages

    def prepare_read(self, tokens: int, pages: KVCache) -> None:
        """As of `Runtime`."""
        self._compile_read(_fit(tokens, self.buckets), pages)

    def prepare_write(self, batch: int, kind: Kind, vocabulary: Vocabulary, pages: KVCache) -> None:
        """As of `Runtime`."""
        self._compile_write(batch, kind, vocabulary, pages)

    def _compile_read(self, bucket: int, pages: KVCache) -> Callable[..., Any]:
        key = (bucket, pages.keys.shape)
        if key not in self._programs:
            step = jax.jit(make_read(*self.described), donate_argnames="pages")
            number, table = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1, self.width), jnp.int32)
            tokens = jax.ShapeDtypeStruct((1, bucket), jnp.int32)
            self._programs[key] = step.lower(self.weights, tokens, number, number, table, pages).compile()
        return self._programs[key]

    def _compile_write(
        self, batch: int, kind: Kind, vocabulary: Vocabulary, pages: KVCache
    ) -> Callable[..., tuple[Made, KVCache]]:
        key = (batch, kind, vocabulary, pages.keys.shape)
        if key not in self._programs:
            step = make_write(*self.described, vocabulary, kind)
            rows = make_rows([], batch, self.width, pages.keys.shape[1])
            extras = make_extras(batch, vocabulary.size) if kind == "full" else None
            compiled = jax.jit(step, donate_argnames="pages").lower(self.weights, rows, extras, np.int32(1), pages)
            self._programs[key] = compiled.compile()
        return self._programs[key]


def make_rows(
    rows: Sequence[tuple[int, int, int, Sequence[int], SamplingConfig, int]], batch: int, width: int, pages: int
) -> Rows:
    """Rows of numpy, padded to `batch`.

    Args:
      rows: of each its last token, where that stands, how many it may make, its pages, and how it chooses which of its
        new tokens.
      batch: B.
      width: M.
      pages: P.
    """
    tokens, limits = np.zeros((2, batch), np.int32)
    positions = np.full(batch, -1, np.int32)
    for index, (token, position, limit, *_) in enumerate(rows):
        tokens[index], positions[index], limits[index] = token, position, limit
    table = make_table([own for _, _, _, own, _, _ in rows], batch, width, pages)
    settings = stack_settings([(config, step) for *_, config, step in rows], batch)
    return Rows(tokens, positions, limits, table, settings)  # type: ignore[arg-type]  # numpy's


def make_table(rows: Sequence[Sequence[int]], batch: int, width: int, pages: int) -> np.ndarray:
    """int32 (B, M): the pages of rows, and P where there are none."""
    table = np.full((batch, width), pages, np.int32)
    for line, own in zip(table, rows, strict=False):
        line[: len(own)] = own
    return table


def make_extras(batch: int, vocab: int) -> Extras:
    """Of rows that have no token, may choose any, and do not want to know probabilities; of numpy, to be changed."""
    seen = np.zeros((batch, vocab), bool)
    allowed = np.full((batch, -(-vocab // 32)), 2**32 - 1, np.uint32)
    return Extras(seen, allowed, np.zeros((), bool))  # type: ignore[arg-type]


def plan_buckets(tokens: int, buckets: Sequence[int]) -> Iterator[int]:
    """The sizes of the calls that read `tokens`: each but the last is full.

    A larger bucket is taken for the rest once it is at least half full: so at most half of a call is padding (save in
    the smallest bucket), and the weights are read few times. `buckets` ascend.
    """
    while tokens > 0:
        fitting = [bucket for bucket in buckets if tokens <= bucket <= 2 * tokens]
        full = [bucket for bucket in buckets if bucket <= tokens]
        bucket = fitting[0] if fitting else full[-1] if full else buckets[0]
        yield bucket
        tokens -= bucket


def _fit(tokens: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds them."""
    return next(bucket for bucket in buckets if tokens <= bucket)
