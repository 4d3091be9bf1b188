"""Signals that end a command, as exceptions; and the calls that they must not cut in two.

Python raises a signal's exception between any two instructions of the main thread, also within a library. One that has
just spoken to a thread of its own, or taken a lock in Python code, is left in a state of which closing it never ends.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Terminated(BaseException):
    """SIGTERM arrived: like `KeyboardInterrupt`, it unwinds, so that nothing half-written stays."""


_EXCEPTIONS: dict[int, type[BaseException]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_holds = 0
_waiting: int | None = None


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Inside, Ctrl-C raises `KeyboardInterrupt` and SIGTERM, by which clusters announce that a machine is taken away,
    `Terminated`, once no `held` call is running. A signal that the process was started to ignore stays ignored.

    Python gives signals to the main thread only; in others this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in _EXCEPTIONS}
    taken = [number for number, handler in kept.items() if handler is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, _raise_or_wait)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, kept[number])


@contextlib.contextmanager
def held() -> Iterator[None]:
    """What runs inside is not cut in two: a signal that arrives meanwhile is raised at its end. For calls that end."""
    global _holds
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1
        _raise_waiting()


def _raise_or_wait(number: int, frame: object) -> None:
    global _waiting
    _waiting = number
    _raise_waiting()


def _raise_waiting() -> None:
    global _waiting
    if _holds == 0 and _waiting is not None:
        number, _waiting = _waiting, None
        raise _EXCEPTIONS[number]
