"""Times ours and its peers by turns, so that a ratio is one of neighbours in time and not of two different minutes."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

FEWEST_ROUNDS = 3

SETTLE_SECONDS = 0.02
"""Before each turn. Threads of OpenMP and ONNX Runtime spin for some milliseconds when their work is done, and would
take the cores from whoever is next."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runner:
    """One way to do the work of a case."""

    name: str
    build: Callable[[], Callable[[], object]]
    """Allocates and compiles, with the tiles of the context (hsai_kernels/tuning.py), and returns what does the work
    `times` times over and waits for the last result."""
    times: int = 1
    disturbs: bool = False
    """Runs so long, or over so much memory, that whoever comes next is slower for it."""

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
    integer: bool = False
    """Whether ours multiplies 8-bit integers."""
    more: Callable[[], dict[str, Any]] | None = None
    """What else is known of ours when it has run, for its row."""
    explain: Callable[[Sequence[dict[str, Any]]], str] | None = None
    """From the case's rows, what else is to be said of them."""

    def rate(self, seconds: float) -> float:
        """`metric` for a time."""
        return self._work / seconds / 1e9

    def seconds(self, rate: float) -> float:
        """The time for a rate in `metric`."""
        return self._work / rate / 1e9

    @property
    def _work(self) -> int:
        return self.nbytes if self.metric == "GB/s" else self.flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """Work that shows what this machine can do just now: it takes its turn beside what is measured, since a machine
    that others use gives twice as much in one minute as in the next."""

    amount: float
    """Bytes, or operations, of a run."""
    runner: Runner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Who shows what this machine can do."""

    read: Probe
    """GB/s."""
    multiply: Probe
    """GFLOP/s of the activations' dtype."""
    multiply_integers: Probe | None
    """GFLOP/s of 8-bit integers; None where nobody else is here to measure it with."""

    def of(self, case: Case) -> Probe | None:
        """The one that bounds the case's metric."""
        if case.metric == "GB/s":
            return self.read
        return self.multiply_integers if case.integer else self.multiply


def time_by_turns(runners: Sequence[Runner], *, rounds: int, seconds: float) -> list[list[float]]:
    """Seconds that each runner takes for its work once, by round.

    Each runs once before (compiling, allocating). Rounds end early when `seconds` have passed, after three at least.

    Whoever is next finds the caches, the clock and the threads as the one before left them, so orders change: every
    other round goes backwards, and each pair of rounds begins one runner later than the pair before. Who disturbs goes
    last, and the first of the next round runs once untimed.
    """
    for runner in runners:
        runner.run()
    taken: list[list[float]] = [[] for _ in runners]
    calm = [i for i, runner in enumerate(runners) if not runner.disturbs]
    last = [i for i, runner in enumerate(runners) if runner.disturbs]
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        order = _turn(calm, done)
        if last:
            runners[order[0]].run()
        for i in (*order, *last):
            time.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            runners[i].run()
            taken[i].append((time.perf_counter() - start) / runners[i].times)
    return taken


def _turn(indices: Sequence[int], done: int) -> list[int]:
    """The order of a round, after `done` others."""
    first = done // 2 % len(indices)
    turned = [*indices[first:], *indices[:first]]
    return turned[::-1] if done % 2 else turned


def measure(case: Case, ceilings: Ceilings, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Rows of results: one of microseconds, then one of `case.metric` for each peer.

    A peer's rate is that of the same work in the peer's time, so that `ratio` (above 1: ours is faster), the median
    over pairs of one round, is one of times whatever the peer itself reads. The spread is from ours' slowest to its
    fastest round. The ceiling is the probe's median, and the percentage the median over pairs with it; None where there
    is no probe.
    """
    probe = ceilings.of(case)
    runners = [case.ours, *case.peers]
    ours, *others = time_by_turns(
        runners if probe is None else [*runners, probe.runner], rounds=rounds, seconds=seconds
    )
    ceiling = percent = None
    if probe is not None:
        rates = [probe.amount / time / 1e9 for time in others.pop()]
        ceiling = statistics.median(rates)
        percent = 100 * statistics.median(case.rate(own) / rate for own, rate in zip(ours, rates, strict=True))
    median = statistics.median(ours)
    first = {
        "case": case.name,
        "metric": "us",
        "ours": 1e6 * median,
        "peer": None,
        "peer_name": None,
        "ratio": None,
        "ceiling": None if ceiling is None else 1e6 * case.seconds(ceiling),
        "percent_of_ceiling": percent,
        "spread": [1e6 * max(ours), 1e6 * min(ours)],
        "n": len(ours),
    }
    if case.more is not None:
        first |= case.more()
    return [first] + [
        {
            "case": case.name,
            "metric": case.metric,
            "ours": case.rate(median),
            "peer": case.rate(statistics.median(times)),
            "peer_name": peer.name,
            "ratio": statistics.median(theirs / own for theirs, own in zip(times, ours, strict=True)),
            "ceiling": ceiling,
            "percent_of_ceiling": percent,
            "spread": [case.rate(max(ours)), case.rate(min(ours))],
            "n": len(ours),
        }
        for peer, times in zip(case.peers, others, strict=True)
    ]


def write_line(case: Case, rows: Sequence[dict[str, Any]]) -> str:
    """A case for the terminal: time and its spread, both rates, percent of the ceiling, and the ratio to each peer."""
    time_row, *peers = rows
    seconds = 1e-6 * time_row["ours"]
    slowest, fastest = time_row["spread"]
    percent = time_row["percent_of_ceiling"]
    share = "–" if percent is None else f"{percent:.1f}%"
    ratios = "  ".join(f"{row['peer_name']} {row['ratio']:.2f}x" for row in peers)
    return (
        f"{case.name:<44} {time_row['ours']:>10.0f} us ({fastest:.0f} to {slowest:.0f})  "
        f"{case.nbytes / seconds / 1e9:6.2f} GB/s {case.flops / seconds / 1e9:8.1f} GFLOP/s  "
        f"{share:>6} of {case.metric:<8} | {ratios}"
    )
