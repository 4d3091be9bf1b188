"""The kernels' bench: what its rows say, checked with a clock that is made up, and one run of the whole script."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
KEYS = "case, metric, ours, peer, peer_name, ratio, ceiling, percent_of_ceiling, spread, n".split(", ")


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench import timing

    return timing


class Clock:
    """A clock that only the runners move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def runner(self, timing: Any, name: str, durations: list[float], times: int = 1) -> Any:
        """Takes each of `durations` in turn, the first of them for warming up."""
        left = iter(durations)

        def run() -> None:
            self.now += next(left)
            self.order.append(name)

        return timing.Runner(name=name, run=run, times=times)


def test_rows_compare_neighbours_in_time(timing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    # Both become slower together: every pair says 3, though medians of either alone would say so only by luck.
    case = timing.Case(
        name="x",
        nbytes=4 * 10**9,
        flops=10**9,
        metric="GB/s",
        ours=clock.runner(timing, "ours", [100.0, 2.0, 4.0, 8.0], times=2),
        peers=[clock.runner(timing, "peer", [100.0, 3.0, 6.0, 12.0])],
    )
    ceilings = timing.Ceilings(read=8.0, multiply=4.0)
    time_row, row = rows = timing.measure(case, ceilings, rounds=3, seconds=1e9)
    assert clock.order == ["ours", "peer"] * 4
    assert all(list(r) == KEYS for r in rows)
    assert (time_row["metric"], time_row["ours"], time_row["ceiling"]) == ("us", 2e6, 0.5e6)
    assert time_row["percent_of_ceiling"] == 25.0 and time_row["spread"] == [4e6, 1e6]
    assert (row["ours"], row["peer"], row["peer_name"], row["ratio"]) == (2.0, pytest.approx(2 / 3), "peer", 3.0)
    assert (row["ceiling"], row["percent_of_ceiling"], row["spread"], row["n"]) == (8.0, 25.0, [1.0, 4.0], 3)
    assert "25.0% of GB/s" in timing.write_line(case, rows, ceilings) and "peer 3.00x" in timing.write_line(
        case, rows, ceilings
    )


def test_time_ends_a_case_after_three_rounds(timing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    assert len(timing.time_by_turns([clock.runner(timing, "a", [1.0] * 9)], rounds=8, seconds=4.5)[0]) == 5
    assert len(timing.time_by_turns([clock.runner(timing, "a", [1.0] * 9)], rounds=8, seconds=0.0)[0]) == 3


@pytest.mark.slow
def test_the_script_measures_and_writes_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "scripts/bench_kernels.py", "--quick", "--ops", "cross_entropy", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "ceilings: reading" in done.stdout and "onnxruntime" in done.stdout
    found = json.loads(out.read_text())
    assert [row["peer_name"] for row in found["rows"]] == [None, "reference"]
    assert all(list(row) == KEYS for row in found["rows"])
    assert found["rows"][1]["ours"] > 0 and found["rows"][1]["n"] >= 3
    assert "--ops cross_entropy" in found["machine"]["command"]


def test_an_unknown_op_is_refused() -> None:
    command = [sys.executable, "scripts/bench_kernels.py", "--ops", "fast"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "invalid choice: 'fast'" in done.stderr
