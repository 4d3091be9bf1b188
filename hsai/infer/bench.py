"""Runs a runtime by itself, without requests, to see how fast it is."""

import time
from collections.abc import Callable

import jax
import numpy as np

from hsai.data.tokenizer import Tokenizer
from hsai.infer.programs import MOST_STEPS, Vocabulary
from hsai.infer.runtime import Runtime, make_rows, plan_buckets
from hsai.infer.sampling import SamplingConfig


class Bench:
    """Rows, one by default, which greedily write whatever comes, and never end."""

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer, *, rows: int = 1) -> None:
        self._runtime = runtime
        self._vocabulary = Vocabulary(tokenizer.vocab_size, frozenset())
        self._tokens = [tokenizer.eot] * rows
        self._tables = [
            list(range(start, start + runtime.width)) for start in range(0, rows * runtime.width, runtime.width)
        ]
        self._pages = runtime.make_pages(rows * runtime.width)

    def repeat(self, work: Callable[[], None], tokens: int, repeats: int) -> list[float]:
        """Tokens a second of work on `tokens`, `repeats` times, slowest first.

        It is done once before: to compile, and to warm caches and threads.
        """
        work()
        speeds = []
        for _ in range(repeats):
            begun = time.perf_counter()
            work()
            speeds.append(tokens / (time.perf_counter() - begun))
        return sorted(speeds)

    def read(self, tokens: np.ndarray) -> None:
        """Reads a prompt from the beginning of the first row."""
        start = 0
        for bucket in plan_buckets(len(tokens), self._runtime.buckets):
            part = tokens[start : start + bucket]
            table = np.asarray(self._tables[:1], np.int32)
            self._pages = jax.block_until_ready(self._runtime.read(part, start, table, self._pages))
            start += len(part)

    def write(self, position: int, tokens: int) -> None:
        """Writes so many tokens of each row, the first of which follows the one at `position`; waits for them."""
        last = self._tokens
        batch = next(size for size in self._runtime.batches if size >= len(last))
        while tokens > 0:
            steps = min(tokens, MOST_STEPS)
            given = [
                (token, position, steps, table, SamplingConfig(), 0)
                for token, table in zip(last, self._tables, strict=True)
            ]
            rows = make_rows(given, batch, self._runtime.width, len(last) * self._runtime.width)
            made, self._pages = self._runtime.write(rows, None, steps, "greedy", self._vocabulary, self._pages)
            last = made.tokens[steps - 1, : len(last)].tolist()
            position, tokens = position + steps, tokens - steps
