"""What a signal does to a command: it unwinds at once, but never within a call that must not be cut in two."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import pytest
from tensorboardX import SummaryWriter

from hsai.signals import Terminated, held, unwinding
from hsai.train.checkpoint import CheckpointConfig, Checkpointer
from hsai.train.metrics import MetricsWriter

BOTH = pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A suite in the background may have been told to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@BOTH
def test_a_signal_raises_at_once(number: int, error: type[BaseException]) -> None:
    reached = []
    with pytest.raises(error), unwinding():
        send(number)
        reached.append("behind it")
    assert reached == []


@BOTH
def test_a_signal_waits_for_what_is_held_around_it(number: int, error: type[BaseException]) -> None:
    reached = []
    with pytest.raises(error), unwinding():
        with held():
            with held():
                send(number)
            reached.append("the outer one goes on")
        reached.append("but nothing behind it")
    assert reached == ["the outer one goes on"]


def test_a_signal_that_has_waited_is_raised_once() -> None:
    with unwinding():
        with pytest.raises(Terminated), held():
            send(signal.SIGTERM)
        with held():
            pass


def test_what_held_raises_is_not_lost_to_a_signal() -> None:
    with pytest.raises(Terminated) as raised, unwinding(), held():
        send(signal.SIGTERM)
        raise ValueError("of the call")
    assert isinstance(raised.value.__context__, ValueError)


def test_handlers_are_given_back_and_ignored_signals_stay_so() -> None:
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with unwinding():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_are_left_alone() -> None:
    seen: list[object] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with unwinding(), held():
            seen.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


def interrupting(owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sends SIGTERM in the middle of each call of `owner.name`; returns the list of calls that came to their end."""
    call: Callable[..., Any] = getattr(owner, name)
    ended: list[str] = []

    def interrupted(*values: Any, **more: Any) -> Any:
        send(signal.SIGTERM)
        for _ in range(10):  # Python looks for signals at the next call at the latest
            pass
        given = call(*values, **more)
        ended.append(name)
        return given

    monkeypatch.setattr(owner, name, interrupted)
    return ended


@pytest.mark.parametrize("name", ["__init__", "add_scalar", "close"])
def test_tensorboard_is_not_cut_in_two(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its writer waits for a thread: cut within a message to it, closing hung, about once in forty SIGTERMs."""
    ended = interrupting(SummaryWriter, name, monkeypatch)
    with pytest.raises(Terminated), unwinding(), MetricsWriter(tmp_path, -1) as writer:
        writer.write(1, {"loss": 1.0})
    assert ended == [name]


@pytest.mark.parametrize("name", ["save", "close"])
def test_a_save_is_not_cut_in_two(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = interrupting(ocp.CheckpointManager, name, monkeypatch)
    config = CheckpointConfig(every=1)
    with pytest.raises(Terminated), unwinding(), Checkpointer(tmp_path / "checkpoints", config) as checkpointer:
        checkpointer.save(1, {"x": 1}, {"next_step": 1})
    assert ended == [name]
    monkeypatch.undo()
    with Checkpointer(tmp_path / "checkpoints", None) as checkpointer:
        assert checkpointer.latest == 1
