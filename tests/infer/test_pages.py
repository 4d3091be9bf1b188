"""The pool of pages against a model of it: nothing is given twice, nothing is lost, names mean contents."""

from collections import Counter
from typing import Any

import hypothesis
import hypothesis.strategies as st

from hsai.infer.pages import PagePool, name_pages

SIZE = 2


def test_names_depend_on_all_tokens_before() -> None:
    first = name_pages([1, 2, 3, 4, 5], SIZE)
    assert len(first) == 2
    assert name_pages([1, 2, 3, 4], SIZE) == first
    assert name_pages([1, 2, 9, 4], SIZE)[0] == first[0] != name_pages([0, 2, 3, 4], SIZE)[0]
    assert name_pages([0, 2, 3, 4], SIZE)[1] != first[1]
    assert name_pages([1, 2, 3, 4, 5, 6], SIZE, first) == name_pages([1, 2, 3, 4, 5, 6], SIZE)
    assert name_pages([1], SIZE) == []


def test_the_longest_unused_page_is_given_up_first_and_the_last_of_a_row_before_its_first() -> None:
    pool = PagePool(4)
    names = name_pages(range(8), SIZE)
    rows = [pool.take(2), pool.take(2)]
    for row, of_row in zip(rows, (names[:2], names[2:]), strict=True):
        assert row is not None
        for page, name in zip(row, of_row, strict=True):
            pool.name(page, name)
        pool.give(row)
    assert (pool.available, pool.kept, pool.held) == (4, 4, 0)
    assert pool.find(names[:1]) == rows[0][:1] and pool.held == 1  # type: ignore[index]
    assert pool.take(4) is None and pool.kept == 3
    assert pool.take(1) == rows[0][1:]  # type: ignore[index]
    assert pool.take(1) == rows[1][1:]  # type: ignore[index]
    assert pool.find(names[:2]) == rows[0][:1]  # type: ignore[index]
    assert pool.find(names[2:]) == rows[1][:1]  # type: ignore[index]


class Rows:
    """Rows that hold pages, and what should be in each page: rows share a page only if they agree about its tokens."""

    def __init__(self, count: int) -> None:
        self.pool = PagePool(count)
        self.rows: list[tuple[list[int], list[int]]] = []
        self.contents: dict[int, tuple[int, ...]] = {}

    def begin(self, tokens: list[int]) -> None:
        names = name_pages(tokens, SIZE)
        found = self.pool.find(names)
        for index, page in enumerate(found):
            assert self.contents[page] == tuple(tokens[: (index + 1) * SIZE])
        new = self.pool.take(-(-len(tokens) // SIZE) - len(found))
        if new is None:
            self.pool.give(found)
            return
        pages = found + new
        for index, name in enumerate(names):
            if index >= len(found):
                assert not any(pages[index] in others for others, _ in self.rows)
                self.contents[pages[index]] = tuple(tokens[: (index + 1) * SIZE])
            self.pool.name(pages[index], name)
        self.rows.append((pages, tokens))

    def end(self, index: int) -> None:
        if self.rows:
            self.pool.give(self.rows.pop(index % len(self.rows))[0])

    def check(self) -> None:
        holders = Counter(page for pages, _ in self.rows for page in pages)
        assert self.pool.held == len(holders)
        assert self.pool.held + self.pool.available == self.pool.count
        for pages, tokens in self.rows:
            for index in range(len(tokens) // SIZE):
                assert self.contents[pages[index]] == tuple(tokens[: (index + 1) * SIZE])


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.integers(1, 9),
    st.lists(
        st.tuples(st.just("begin"), st.lists(st.integers(0, 2), min_size=1, max_size=9))
        | st.tuples(st.just("end"), st.integers(0, 8))
    ),
)
def test_rows_that_come_and_go(count: int, steps: list[tuple[str, Any]]) -> None:
    rows = Rows(count)
    for action, argument in steps:
        getattr(rows, action)(argument)
        rows.check()
    while rows.rows:
        rows.end(0)
    assert rows.pool.available == count
    everything = rows.pool.take(count)
    assert everything is not None and sorted(everything) == list(range(count))


def test_a_page_that_nobody_holds_is_not_shared_by_chance() -> None:
    """Two rows that read the same prompt at once each have their page; the second finds the name taken."""
    pool = PagePool(2)
    name = name_pages([1, 2], SIZE)[0]
    first, second = pool.take(1), pool.take(1)
    assert first is not None and second is not None
    for row in (first, second):
        pool.name(row[0], name)
        pool.give(row)
    assert (pool.kept, pool.available) == (1, 2)
