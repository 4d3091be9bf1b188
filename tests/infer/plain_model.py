"""A model of plain Python, whose pages hold tokens, as the scheduler's runtime and as its speculator.

The model's next token is a function of all tokens that it finds in the row's pages: a page too few, one of another row,
or one that was given away too early changes the text.
"""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from hsai.infer.choose import Extras, Kind
from hsai.infer.programs import MOST_STEPS, Made, Rows, Vocabulary

SLOTS, PAGE = 40, 4
SIZE = 280


def choose(tokens: list[int]) -> int:
    """The token behind these; one of 23 ends the text (0), and most others are few, so that texts begin alike."""
    digest = zlib.crc32(np.asarray(tokens, np.int32).tobytes())
    return 0 if digest % 23 == 0 else 1 + digest // 23 % 5


def continue_text(prompt: tuple[int, ...], most: int) -> tuple[tuple[int, ...], str]:
    """What the model makes of a prompt, and why it ends."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < min(most, SLOTS + 1 - len(prompt)):
        token = choose(tokens)
        if token == 0:
            return tuple(tokens[len(prompt) :]), "end_of_text"
        tokens.append(token)
    new = tuple(tokens[len(prompt) :])
    return new, "max_tokens" if len(new) == most else "context"


class PlainRuntime:
    """A `hsai.infer.runtime.Runtime`; its pages are an array of tokens (P, R), -1 where nothing was written."""

    slots, page, width = SLOTS, PAGE, SLOTS // PAGE
    buckets = (4, 8)
    batches = (1, 2, 4, 8)

    def __init__(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """`meanwhile` is what others do while something runs."""
        self.meanwhile = meanwhile
        self.reads = 0
        self.blocks: list[tuple[int, int]] = []
        self.broken = 0

    def make_pages(self, count: int) -> Any:
        return np.full((count, PAGE), -1)

    def read(self, tokens: np.ndarray, start: int, table: np.ndarray, pages: Any) -> Any:
        assert 1 <= len(tokens) <= 8
        self.reads += len(tokens)
        for place, token in enumerate(tokens.tolist(), start):
            pages[table[0, place // PAGE], place % PAGE] = token
        self.meanwhile()
        return pages

    def write(
        self, rows: Rows, extras: Extras | None, steps: int, kind: Kind, vocabulary: Vocabulary, pages: Any
    ) -> tuple[Made, Any]:
        if self.broken:
            self.broken -= 1
            raise RuntimeError("broken on purpose")
        made = np.full((MOST_STEPS, len(rows.tokens)), -1)
        for row, (token, position, limit) in enumerate(zip(rows.tokens, rows.positions, rows.limits, strict=True)):
            for step in range(min(steps, int(limit)) if position >= 0 else 0):
                table = np.asarray(rows.table[row])
                pages[table[position // PAGE], position % PAGE] = token
                token = made[step, row] = choose([pages[table[p // PAGE], p % PAGE] for p in range(position + 1)])
                position += 1
                if token in vocabulary.stops:
                    break
        self.blocks.append((len(rows.tokens), steps))
        self.meanwhile()
        return Made(made), pages  # type: ignore[arg-type]

    def prepare_read(self, tokens: int, pages: Any) -> None: ...

    def prepare_write(self, batch: int, kind: Kind, vocabulary: Vocabulary, pages: Any) -> None: ...


class PlainSpeculator:
    """A `hsai.infer.speculator.Speculator`; the draft model's pages are like the other's, if it has any.

    It knows what the model will say, and is wrong about every third token.
    """

    drafts = 3

    def __init__(self, has_pages: bool) -> None:
        self.has_pages = has_pages

    def make_pages(self, count: int) -> Any:
        return np.full((count, PAGE), -1) if self.has_pages else None

    def read(self, tokens: np.ndarray, start: int, table: np.ndarray, pages: Any) -> Any:
        return PlainRuntime().read(tokens, start, table, pages)

    def write(
        self, rows: Rows, steps: int, kind: Kind, vocabulary: Vocabulary, pages: Any, draft_pages: Any
    ) -> tuple[Made, Any, Any]:
        assert kind != "full" and rows.history is not None
        made = np.full((MOST_STEPS * (1 + self.drafts), len(rows.tokens)), -1)
        counts = np.zeros((2, len(rows.tokens)), int)
        for row, (token, position, limit) in enumerate(zip(rows.tokens, rows.positions, rows.limits, strict=True)):
            if position < 0:
                continue
            table = np.asarray(rows.table[row])
            text = np.asarray(rows.history[row])[: position + 1].tolist()
            assert text[-1] == token

            def put(pages: Any, place: int, token: int, table: np.ndarray = table) -> None:
                pages[table[place // PAGE], place % PAGE] = token

            for _ in range(steps):
                drafts = []
                for _ in range(min(self.drafts, limit - len(text) + position)):
                    right = choose([*text, *drafts])
                    drafts.append(right if zlib.crc32(bytes(text)) % 3 else right + 1)
                last = len(text) - 1
                if draft_pages is not None:
                    for place in range(last - 1):
                        assert draft_pages[table[place // PAGE], place % PAGE] == text[place]
                    for place, read in enumerate([*text, *drafts[:-1]]):
                        if place >= last - 1:
                            put(draft_pages, place, read)
                for place, read in enumerate([text[-1], *drafts], last):
                    put(pages, place, read)
                for place in range(len(drafts) + 1):
                    seen = [pages[table[p // PAGE], p % PAGE] for p in range(last + 1 + place)]
                    text.append(choose(seen))
                    if text[-1] in vocabulary.stops or drafts[place : place + 1] != [text[-1]]:
                        break
                counts[:, row] += len(drafts), place
                if text[-1] in vocabulary.stops or len(text) - 1 - position == limit:
                    break
            made[: len(text) - 1 - position, row] = text[position + 1 :]
        return Made(made, drafts=counts), pages, draft_pages  # type: ignore[arg-type]

    def prepare_read(self, tokens: int, pages: Any) -> None: ...

    def prepare_write(self, batch: int, kind: Kind, vocabulary: Vocabulary, pages: Any, draft_pages: Any) -> None: ...
