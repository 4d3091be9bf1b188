"""Peers in processes of their own, which are stopped while it is not their turn.

Threads of OpenMP and of ONNX Runtime spin when their work is done, some of them for a fifth of a second, and would take
the cores from whoever is next; and what one library asks of OpenMP another one gets. A stopped process takes nothing.
A process ends with whoever started it, however that ends.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
import weakref
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess


class Apart:
    """What does the work, in a process of its own: called, it runs once, and returns when it is done.

    Raises RuntimeError, with what the process said, where building or running failed there.
    """

    def __init__(self, build: Callable[[], Callable[[], object]], environment: Mapping[str, str]) -> None:
        """Starts the process, which calls `build`, with these variables in its environment; `build` is pickled."""
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, build), daemon=True)
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        weakref.finalize(self, _end, self._process)
        self._wait()

    def __call__(self) -> None:
        """Runs once."""
        self._signal(signal.SIGCONT)
        self._connection.send(None)
        self._wait()

    def _wait(self) -> None:
        try:
            fault = self._connection.recv()
        except EOFError:
            fault = f"the process ended with {self._process.exitcode}"
        if fault is not None:
            raise RuntimeError(fault)
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


PR_SET_PDEATHSIG = 1


def _serve(connection: Connection, build: Callable[[], Callable[[], object]]) -> None:
    # A stopped process would not see that the connection has ended.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        run = build()
        connection.send(None)
        while True:
            connection.recv()
            run()
            connection.send(None)
    except EOFError:  # whoever started this has ended
        pass
    except BaseException:
        connection.send(traceback.format_exc())


def _end(process: BaseProcess) -> None:
    """A stopped process hears no other signal."""
    process.kill()
    process.join()
