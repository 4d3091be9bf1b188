"""Makes the next items in a thread while the present one is used."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class _Failure:
    """Carries an exception from the thread to whoever waits for the next item."""

    def __init__(self, error: BaseException):
        self.error = error


_END = object()


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Yields what `items` yields, in order, made ahead in a thread: never more than `depth` items wait.

    The thread starts with the first item asked for and has ended when the iterator is exhausted, closed or dropped. An
    exception in `items` is raised here, in its turn, after the items before it.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1")
    # Queues in C alone: a signal may cut a call of Python's own locks in two, and what closes them then never ends.
    ready: queue.SimpleQueue = queue.SimpleQueue()
    slots: queue.SimpleQueue = queue.SimpleQueue()
    for _ in range(depth):
        slots.put(None)
    closed = False

    def produce() -> None:
        try:
            iterator = iter(items)
            while True:
                slots.get()
                if closed:
                    return
                item = next(iterator, _END)
                ready.put(item)
                if item is _END:
                    return
        except BaseException as error:
            ready.put(_Failure(error))

    # A daemon, so that a process which dies of another error does not wait for a slow disk.
    thread = threading.Thread(target=produce, name="hsai-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            slots.put(None)
            yield item
    finally:
        closed = True
        slots.put(None)
        thread.join()
