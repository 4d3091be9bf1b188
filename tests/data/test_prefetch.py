"""Prefetching: order, bound, exceptions, and no thread left behind."""

import itertools
import threading
from collections.abc import Iterator

import pytest

from hsai.data.prefetch import prefetch


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hsai-prefetch"]


def test_items_in_order():
    assert list(prefetch(range(100), 3)) == list(range(100))
    assert list(prefetch([], 1)) == []
    assert list(prefetch([None, None], 1)) == [None, None]
    assert not workers()


def test_no_more_than_depth_are_made_ahead():
    made: list[int] = []

    def items() -> Iterator[int]:
        for item in itertools.count():
            made.append(item)
            yield item

    iterator = prefetch(items(), 3)
    for consumed in range(1, 20):
        next(iterator)
        assert len(made) <= consumed + 3
    iterator.close()
    assert not workers()
    after = len(made)
    assert after <= 19 + 3


def test_exceptions_arrive_in_their_turn():
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("disk")

    iterator = prefetch(items(), 5)
    assert [next(iterator), next(iterator)] == [1, 2]
    with pytest.raises(KeyError, match="disk"):
        next(iterator)
    assert not workers()


def test_leaving_a_loop_ends_the_thread():
    iterator = prefetch(itertools.count(), 2)
    for item in iterator:
        if item == 5:
            break
    assert workers()
    del iterator
    assert not workers()


def test_work_is_done_in_another_thread():
    names = list(prefetch((threading.current_thread().name for _ in range(3)), 1))
    assert names == ["hsai-prefetch"] * 3


def test_depth_must_be_positive():
    with pytest.raises(ValueError, match="depth=0"):
        next(prefetch([1], 0))
