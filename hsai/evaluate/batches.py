"""Pairs as batches: what a group of pairs shares is cut off, and groups of like lengths are put together.

G groups in a batch, P prefix, R rows, S suffix.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from hsai.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Tokens to score, and those before them."""

    context: tuple[int, ...]
    """At least one token; of a pair longer than the model's context, the first ones are not read."""

    continuation: tuple[int, ...]
    """At least one token: what is scored."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One pair as the model reads it."""

    place: int
    """Index of the pair among all pairs."""

    tokens: tuple[int, ...]
    """The input, behind the group's prefix; its last tokens predict `targets`."""

    targets: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that share a prefix, which may be empty."""

    prefix: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def suffix_length(self) -> int:
        return max(len(row.tokens) for row in self.rows)

    @property
    def tokens(self) -> int:
        """What is computed for it, without padding."""
        return len(self.prefix) + sum(len(row.tokens) for row in self.rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Groups that are computed together, each of as many rows."""

    groups: Sequence[Group]

    prefix: int
    """P, padded."""

    suffix: int
    """S, padded."""

    count: int
    """G, padded."""


def cut_groups(groups: Sequence[Sequence[Pair]], *, max_length: int, vocab: int) -> list[Group]:
    """The groups with what they share cut off, for a model that reads max_length tokens out of vocab.

    Raises:
      InputError: a token is not in the model's vocabulary, or a continuation is longer than the model's context.
      ValueError: a context or a continuation is empty.
    """
    cut, place = [], 0
    for pairs in groups:
        inputs = []
        for pair in pairs:
            _check(pair, max_length, vocab)
            whole = (pair.context + pair.continuation)[-(max_length + 1) :]
            inputs.append(whole[:-1])
        shared = _count_shared(inputs, pairs) if len(pairs) > 1 else 0
        rows = []
        for pair, tokens in zip(pairs, inputs, strict=True):
            rows.append(Row(place=place, tokens=tokens[shared:], targets=pair.continuation))
            place += 1
        if rows:
            cut.append(Group(prefix=inputs[0][:shared], rows=tuple(rows)))
    return cut


def plan_batches(groups: Sequence[Group], *, tokens: int, parts: int) -> Iterator[Batch]:
    """Batches of groups of as many rows and the same padded lengths; the longest first, so that what does not fit the
    memory fails at once.

    Args:
      groups: of `cut_groups`.
      tokens: of a batch, padding included, at most; one group may have more.
      parts: devices that rows are split over; groups of a batch are padded to a multiple of it.
    """
    kinds: dict[tuple[int, int, int], list[Group]] = {}
    for group in groups:
        lengths = pad_length(len(group.prefix)), pad_length(group.suffix_length)
        kinds.setdefault((*lengths, len(group.rows)), []).append(group)
    for (prefix, suffix, rows), alike in sorted(kinds.items(), reverse=True):
        most = max(tokens // (prefix + rows * suffix) // parts, 1) * parts
        for start in range(0, len(alike), most):
            batch = alike[start : start + most]
            yield Batch(groups=batch, prefix=prefix, suffix=suffix, count=min(most, _round(len(batch), parts)))


def pad_length(length: int) -> int:
    """The length that so many tokens are padded to: a multiple of 4, and beyond 32 four to eight lengths an octave."""
    step = max(4, 2 ** ((max(length, 1) - 1).bit_length() - 3))
    return -(-length // step) * step


def stack_rows(rows: Sequence[tuple[int, ...]], count: int, length: int) -> np.ndarray:
    """int32 (count, length), zeros behind each row and below the last."""
    stacked = np.zeros((count, length), np.int32)
    for index, row in enumerate(rows):
        stacked[index, : len(row)] = row
    return stacked


def _check(pair: Pair, max_length: int, vocab: int) -> None:
    if not pair.context or not pair.continuation:
        raise ValueError(f"a pair needs a context and a continuation, got {pair}")
    if len(pair.continuation) > max_length:
        raise InputError(
            f"a continuation of {len(pair.continuation)} tokens exceeds the model's context of {max_length}"
        )
    for token in (min(min(pair.context), min(pair.continuation)), max(max(pair.context), max(pair.continuation))):
        if not 0 <= token < vocab:
            raise InputError(f"token id {token} is out of range; valid are 0 to {vocab - 1}")


def _count_shared(inputs: Sequence[tuple[int, ...]], pairs: Sequence[Pair]) -> int:
    """How many tokens all inputs begin with, that score nothing in any of them."""
    free = min(len(tokens) - len(pair.continuation) for tokens, pair in zip(inputs, pairs, strict=True))
    for index in range(free):
        if any(tokens[index] != inputs[0][index] for tokens in inputs):
            return index
    return free


def _round(groups: int, parts: int) -> int:
    """Groups of an array for so many: a power of two times the devices that split it; few programs serve all."""
    count = parts
    while count < groups:
        count *= 2
    return count
