"""What a run measured: one JSON line a logged step, the same scalars for TensorBoard, and the pace of training.

`metrics.jsonl` is what plots and reports are made from, so it must be right after any kill: rows that a killed run
wrote after its last checkpoint would come twice when the run resumes, and are dropped first.
"""

import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import jax
from tensorboardX import SummaryWriter

from hsai.errors import InputError
from hsai.files import atomic_write
from hsai.models.transformer import TransformerConfig
from hsai.signals import held
from hsai.train.flops import flops_per_token, peak_flops

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsWriter:
    """Appends rows to `directory`/metrics.jsonl and `directory`/tensorboard, flushed one by one.

    Only process 0 of a run writes; in the others every call does nothing. JSON has no NaN and no infinity: such a value
    becomes `null` in its row, which says that the step was logged and the number was none.

    Args:
      directory: of the run; it is made if needed.
      resume_step: the last step that the checkpoint holds. Rows of later steps, and a last line that a kill tore, are
        removed atomically. A run that starts over passes -1.
    """

    def __init__(self, directory: str | os.PathLike[str], resume_step: int) -> None:
        self._rows: TextIO | None = None
        self._tensorboard: SummaryWriter | None = None
        if jax.process_index() != 0:
            return
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        if path.exists():
            _truncate(path, resume_step)
        self._rows = path.open("a", encoding="utf-8")
        # Event files are never rewritten; TensorBoard itself hides what an earlier one holds from purge_step on.
        with held():  # it writes in a thread, here and below
            self._tensorboard = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one row: {"step": step, **metrics}. It has left this process when the call returns, so that a kill
        cannot take it; values may be anything that float() takes. Raises ValueError if a metric is called "step"."""
        if "step" in metrics:
            raise ValueError(f"a metric cannot be called 'step': that is the row's own number, {step}")
        if self._rows is None or self._tensorboard is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._rows.write(json.dumps(row, allow_nan=False) + "\n")
        self._rows.flush()
        with held():
            for name, value in values.items():
                if math.isfinite(value):
                    self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def close(self) -> None:
        """Closes both files; later writes do nothing."""
        if self._rows is not None and self._tensorboard is not None:
            self._rows.close()
            with held():
                self._tensorboard.close()
        self._rows = self._tensorboard = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl in the order of their writing; `null` reads as NaN, "step" as an int.

    A last line that was torn by a kill is left out. Raises `InputError` that names the file, and the line if it is not
    a row.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is not None:
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
        elif number < len(lines):
            raise InputError(f"{path} line {number} is not a row of metrics: {line[:60]!r}")
    return rows


def _parse(line: str) -> dict[str, Any] | None:
    """The row that a line holds, or None. A proper prefix of a row never parses, so that a torn one cannot pass."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _truncate(path: Path, last_step: int) -> None:
    """Removes the rows of steps after `last_step` and a torn last line; the rows that stay keep their bytes."""
    read_metrics(path)  # a file of something else is refused, not rewritten
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = [line for line in text.splitlines() if (row := _parse(line)) is not None and row["step"] <= last_step]
    whole = "".join(line + "\n" for line in kept)
    if whole != text:
        with atomic_write(path) as temporary:
            temporary.write_text(whole, encoding="utf-8")


class Throughput:
    """The pace of training over the steps since the last summary.

    `tick` is called at the end of each step; the time from one tick to the next, less what was spent `paused`, is one
    step's. The first tick only starts the clock, so that compilation is never counted. jax returns before a step has
    run: call `tick` when something of the step has reached the host.

    Args:
      model: whose flops are counted.
      sequence_length: of the rows that are trained on.
      device: one of the devices that the step runs on; all are of its kind.
      device_count: of all processes.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        model: TransformerConfig,
        sequence_length: int,
        device: jax.Device,
        device_count: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        peak = peak_flops(device)
        self._peak = None if peak is None else peak * device_count
        self._flops = flops_per_token(model, sequence_length)
        self._clock = clock
        self._last: float | None = None
        self._paused = 0.0
        self._steps: list[tuple[float, float]] = []

    def tick(self, tokens: float) -> None:
        """Ends a step that trained on `tokens` tokens, over all processes."""
        now = self._clock()
        if self._last is not None:
            self._steps.append((now - self._last - self._paused, float(tokens)))
        self._last, self._paused = now, 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside (an evaluation, a checkpoint) is no part of any step."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def summary(self) -> dict[str, float]:
        """The window's metrics; starts a new window.

        Returns: step_seconds (the median, which one slow step does not move), tokens_per_second at that pace, and mfu,
        the share of the devices' peak that the model's own flops take (0 to 1). No mfu where the chip's peak is not
        known; nothing at all where no step was timed.
        """
        if not self._steps:
            return {}
        seconds = statistics.median(seconds for seconds, _ in self._steps)
        pace = statistics.fmean(tokens for _, tokens in self._steps) / seconds
        self._steps.clear()
        summary = {"step_seconds": seconds, "tokens_per_second": pace}
        if self._peak is not None:
            summary["mfu"] = pace * self._flops / self._peak
        return summary


def describe_step(row: Mapping[str, float], logged: Mapping[str, float]) -> str:
    """The console's words on a step: its own loss and norms, and the pace that was logged last."""
    text = f"loss {row['loss']:.3f}, |gradient| {row['grad_norm']:.2f}, |update| {row['update_norm']:.2g}"
    if "tokens_per_second" in logged:
        text += f", {logged['tokens_per_second']:,.0f} tokens/s, {logged['step_seconds']:.3g} s a step"
    if "mfu" in logged:
        text += f", {100 * logged['mfu']:.1f} % of peak"
    return text
