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
    """One row, which greedily writes whatever comes, and never ends."""

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer) -> None:
        self._runtime = runtime
        self._vocabulary = Vocabulary(tokenizer.vocab_size, frozenset())
        self._token = tokenizer.eot
        self._table = list(range(runtime.width))
        self._pages = runtime.make_pages(runtime.width)

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
        """Reads a prompt from the beginning of the row."""
        start = 0
        for bucket in plan_buckets(len(tokens), self._runtime.buckets):
            part = tokens[start : start + bucket]
            table = np.asarray([self._table], np.int32)
            self._pages = jax.block_until_ready(self._runtime.read(part, start, table, self._pages))
            start += len(part)

    def write(self, position: int, tokens: int) -> None:
        """Writes so many tokens, the first of which follows the one at `position`; waits for them."""
        token = self._token
        while tokens > 0:
            steps = min(tokens, MOST_STEPS)
            row = (token, position, steps, self._table, SamplingConfig(), 0)
            rows = make_rows([row], 1, self._runtime.width, len(self._table))
            made, self._pages = self._runtime.write(rows, None, steps, "greedy", self._vocabulary, self._pages)
            token = int(made.tokens[steps - 1, 0])
            position, tokens = position + steps, tokens - steps
