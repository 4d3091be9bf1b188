"""Times ours and its peers by turns, so that a ratio is one of neighbours in time and not of two different minutes."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

FEWEST_ROUNDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runner:
    """One way to do the work of a case."""

    name: str
    build: Callable[[], Callable[[], object]]
    """Allocates and compiles, with the tiles of the context (hsai_kernels/tuning.py), and returns what does the work
    `times` times over and waits for the last result."""
    times: int = 1

    @functools.cached_property
    def run(self) -> Callable[[], object]:
        """What `build` returns, the first time that it is asked for."""
        return self.build()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One shape in one format: what has to be read and computed for it, and who does that."""

    name: str
    nbytes: int
    """Read from memory each time: weights as they are stored, or keys and values."""
    flops: int
    """Of the dense product, whatever a format leaves out of it."""
    metric: str
    """What bounds it: "GB/s" or "GFLOP/s"."""
    ours: Runner
    peers: Sequence[Runner] = ()
    explain: Callable[[Sequence[dict[str, Any]]], str] | None = None
    """From the case's rows, what else is to be said of them."""

    def rate(self, seconds: float) -> float:
        """`metric` for a time."""
        return (self.nbytes if self.metric == "GB/s" else self.flops) / seconds / 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this machine can do, measured in this process."""

    read: float
    """GB/s."""
    multiply: float
    """GFLOP/s."""

    def of(self, metric: str) -> float:
        """The one that bounds `metric`."""
        return self.read if metric == "GB/s" else self.multiply


def time_by_turns(runners: Sequence[Runner], *, rounds: int, seconds: float) -> list[list[float]]:
    """Seconds that each runner takes for its work once, by round.

    Each runs once before (compiling, allocating). Rounds end early when `seconds` have passed, after three at least.
    """
    for runner in runners:
        runner.run()
    taken: list[list[float]] = [[] for _ in runners]
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for runner, times in zip(runners, taken, strict=True):
            start = time.perf_counter()
            runner.run()
            times.append((time.perf_counter() - start) / runner.times)
    return taken


def measure(case: Case, ceilings: Ceilings, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Rows of results: one of microseconds, then one of `case.metric` for each peer.

    A peer's rate is that of the same work in the peer's time, so that `ratio` (above 1: ours is faster), the median
    over pairs of neighbours, is one of times whatever the peer itself reads. The spread is from ours' slowest to its
    fastest round. The ceiling of a time is what bandwidth and flops allow.
    """
    ours, *others = time_by_turns([case.ours, *case.peers], rounds=rounds, seconds=seconds)
    median = statistics.median(ours)
    bound = 1e-3 * max(case.nbytes / ceilings.read, case.flops / ceilings.multiply)
    rows: list[dict[str, Any]] = [
        {
            "case": case.name,
            "metric": "us",
            "ours": 1e6 * median,
            "peer": None,
            "peer_name": None,
            "ratio": None,
            "ceiling": bound,
            "percent_of_ceiling": 100e-6 * bound / median,
            "spread": [1e6 * max(ours), 1e6 * min(ours)],
            "n": len(ours),
        }
    ]
    ceiling = ceilings.of(case.metric)
    for peer, times in zip(case.peers, others, strict=True):
        rows.append(
            {
                "case": case.name,
                "metric": case.metric,
                "ours": case.rate(median),
                "peer": case.rate(statistics.median(times)),
                "peer_name": peer.name,
                "ratio": statistics.median(theirs / own for theirs, own in zip(times, ours, strict=True)),
                "ceiling": ceiling,
                "percent_of_ceiling": 100 * case.rate(median) / ceiling,
                "spread": [case.rate(max(ours)), case.rate(min(ours))],
                "n": len(ours),
            }
        )
    return rows


def write_line(case: Case, rows: Sequence[dict[str, Any]], ceilings: Ceilings) -> str:
    """A case for the terminal: time and its spread, both rates, percent of the ceiling, and the ratio to each peer."""
    time_row, *peers = rows
    seconds = 1e-6 * time_row["ours"]
    slowest, fastest = time_row["spread"]
    percent = 100 * case.rate(seconds) / ceilings.of(case.metric)
    ratios = "  ".join(f"{row['peer_name']} {row['ratio']:.2f}x" for row in peers)
    return (
        f"{case.name:<44} {time_row['ours']:>10.0f} us ({fastest:.0f} to {slowest:.0f})  "
        f"{case.nbytes / seconds / 1e9:6.2f} GB/s {case.flops / seconds / 1e9:8.1f} GFLOP/s  "
        f"{percent:5.1f}% of {case.metric:<8} | {ratios}"
    )
