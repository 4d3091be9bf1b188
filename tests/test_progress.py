"""Progress: a bar on a terminal, few lines in a log, nothing on other processes."""

import io

import jax
import pytest
from rich.console import Console

from hsai import progress
from hsai.progress import ProgressBar, say


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Stands for a log file in the place of stdout."""
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, width=120, highlight=False))
    return stream


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 4.0, 5.5, 6.0, 7.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with ProgressBar() as bar:
        for done in range(1, 7):
            bar("training", done, 6, f"[step {done}]")  # square brackets are text, not markup
    assert log.getvalue() == "training: 66% [step 4]\ntraining: 100% [step 6]\n"


def test_nothing_to_do_is_done(log: io.StringIO) -> None:
    with ProgressBar() as bar:
        bar("tokenizing", 0, 0)
    assert log.getvalue() == "tokenizing: 100%\n"


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, force_terminal=True, width=120))
    with ProgressBar() as bar:
        bar("training", 1, 4, "loss 2.5")
        bar("training", 4, 4, "loss 1.5")
    shown = stream.getvalue()
    assert "training" in shown and "100%" in shown and "loss 1.5" in shown and "left" in shown


def test_other_processes_are_silent(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    say("hello")
    with ProgressBar() as bar:
        bar("training", 4, 4)
    assert log.getvalue() == ""
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    say("[hello]")
    assert log.getvalue() == "[hello]\n"
