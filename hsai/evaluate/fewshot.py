"""Solved examples before a question: those that EleutherAI's harness takes, in its order (lm_eval.api.samplers)."""

import random
from collections.abc import Sequence

from hsai.errors import InputError
from hsai.evaluate.documents import Document

SEED = 1234
"""The harness's own."""


class ExampleSampler:
    """Draws examples for one document after the other; a document's own depend on how many were asked for before."""

    def __init__(self, pool: Sequence[Document], *, count: int, seed: int, own: bool, first: bool) -> None:
        """Prepares to draw.

        Args:
          pool: documents with answers.
          count: examples for each document.
          seed: of the draws.
          own: the pool is the very set that is asked, so a document must not be its own example.
          first: the first of the pool stand before every document, in their order (MMLU).
        Raises:
          InputError: the pool holds too few.
        """
        available = len(pool) - own
        if count > available:
            raise InputError(f"--few-shot {count} is too many: the task has {available} examples")
        self._pool = list(pool)
        self._count = count
        self._random = random.Random(seed)
        self._own = own
        self._first = first

    def draw(self, document: Document) -> list[Document]:
        """The examples that stand before `document`, the first one first."""
        if self._count == 0:
            return []
        if self._first:
            return self._pool[: self._count]
        if not self._own:
            return self._random.sample(self._pool, self._count)
        found = [other for other in self._random.sample(self._pool, self._count + 1) if other != document]
        if len(found) < self._count:  # the pool holds the document more than once
            found = self._random.sample([other for other in self._pool if other != document], self._count)
        return found[: self._count]
