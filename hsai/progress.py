"""Progress of long steps: a bar on a terminal, a line now and then in a log file, nothing on other processes."""

import time
from types import TracebackType

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False)
if not console.is_terminal:
    console.width = 120  # a log file has no width; tables should not be folded for its sake
LINE_SECONDS = 5.0


def say(message: str) -> None:
    """Prints a line, on the first process of a run only."""
    if jax.process_index() == 0:
        console.print(message, markup=False, soft_wrap=True)


class ProgressBar:
    """Shows (description, done, total) reports; use as a context manager and call it.

    On a terminal each description is a bar with the time left; elsewhere a line at most every five seconds, and one at
    the end of each description.
    """

    def __init__(self) -> None:
        self._quiet = jax.process_index() != 0
        self._bar = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=self._quiet or not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, float] = {}

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, description: str, done: int, total: int, note: str = "") -> None:
        """Reports that `done` of `total` is done; `note` is shown behind it."""
        if self._quiet:
            return
        if console.is_terminal:
            if description not in self._tasks:
                self._tasks[description] = self._bar.add_task(description, total=total, note=note)
            self._bar.update(self._tasks[description], completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if now - self._printed.setdefault(description, now) >= LINE_SECONDS or done >= total:
            self._printed[description] = now
            percent = 100 * done // total if total else 100
            console.print(f"{description}: {percent}% {note}".rstrip(), markup=False, soft_wrap=True)
