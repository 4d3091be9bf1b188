"""The kernels' bench: what its rows say, checked with a clock that is made up, and one run of the whole script."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hsai_kernels import tuning
from hsai_kernels.dispatch import compile_for

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

        return timing.Runner(name=name, build=lambda: run, times=times)


def make_ceilings(clock: Clock, timing: Any, **durations: list[float] | None) -> Any:
    """Probes of 32e9 bytes or operations, each as long as it is told."""
    probes = {
        name: None if taken is None else timing.Probe(amount=32e9, runner=clock.runner(timing, name, taken))
        for name, taken in ({"read": [], "multiply": [], "multiply_integers": None} | durations).items()
    }
    return timing.Ceilings(**probes)


def test_rows_compare_neighbours_in_time(timing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    # All become slower together: every pair says 3, though medians of either alone would say so only by luck, and in
    # the time of ours a fourth of what can be read just then is read.
    case = timing.Case(
        name="x",
        nbytes=4 * 10**9,
        flops=10**9,
        metric="GB/s",
        ours=clock.runner(timing, "ours", [100.0, 2.0, 4.0, 8.0], times=2),
        peers=[clock.runner(timing, "peer", [100.0, 3.0, 6.0, 12.0])],
    )
    ceilings = make_ceilings(clock, timing, read=[100.0, 2.0, 4.0, 8.0])
    time_row, row = rows = timing.measure(case, ceilings, rounds=3, seconds=1e9)
    turns = ["ours peer read", "read peer ours", "peer read ours"]
    assert " ".join(clock.order) == " ".join(["ours peer read", *turns])
    assert all(list(r) == KEYS for r in rows)
    assert (time_row["metric"], time_row["ours"], time_row["ceiling"]) == ("us", 2e6, 0.5e6)
    assert time_row["percent_of_ceiling"] == 25.0 and time_row["spread"] == [4e6, 1e6]
    assert (row["ours"], row["peer"], row["peer_name"], row["ratio"]) == (2.0, pytest.approx(2 / 3), "peer", 3.0)
    assert (row["ceiling"], row["percent_of_ceiling"], row["spread"], row["n"]) == (8.0, 25.0, [1.0, 4.0], 3)
    assert "25.0% of GB/s" in timing.write_line(case, rows) and "peer 3.00x" in timing.write_line(case, rows)


def test_whoever_is_next_follows_someone_else_each_round(timing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    timing.time_by_turns([clock.runner(timing, name, [1.0] * 9) for name in "abc"], rounds=6, seconds=1e9)
    turns = ["".join(clock.order[i : i + 3]) for i in range(3, 21, 3)]
    assert turns == ["abc", "cba", "bca", "acb", "cab", "bac"]


def test_what_follows_a_runner_that_disturbs_is_not_timed(timing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    # To warm up; then of each round the first runs twice, and takes longer for it the first time.
    ours = clock.runner(timing, "ours", [9.0, 9.0, 1.0, 1.0, 1.0])
    peer = clock.runner(timing, "peer", [9.0, 2.0, 9.0, 2.0, 9.0, 2.0])
    reference = dataclasses.replace(clock.runner(timing, "reference", [9.0] * 4), disturbs=True)
    taken = timing.time_by_turns([ours, reference, peer], rounds=3, seconds=1e9)
    assert taken == [[1.0] * 3, [9.0] * 3, [2.0] * 3]
    rounds = ["ours ours peer reference", "peer peer ours reference", "peer peer ours reference"]
    assert " ".join(clock.order) == " ".join(["ours reference peer", *rounds])


def test_integers_have_their_own_ceiling(timing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    found = []
    for integers in ([2.0] * 4, None):
        ours, peer = (clock.runner(timing, name, [1.0] * 4) for name in ("ours", "peer"))
        case = timing.Case(
            name="x", nbytes=10**9, flops=4 * 10**9, metric="GFLOP/s", ours=ours, peers=[peer], integer=True
        )
        ceilings = make_ceilings(clock, timing, multiply_integers=integers)
        rows = timing.measure(case, ceilings, rounds=3, seconds=1e9)
        found.append([(row["ceiling"], row["percent_of_ceiling"]) for row in rows])
        assert ("25.0% of GFLOP/s" if integers else " – of GFLOP/s") in timing.write_line(case, rows)
    assert found == [[(0.25e6, 25.0), (16.0, 25.0)], [(None, None), (None, None)]]
    assert ceilings.of(dataclasses.replace(case, metric="GB/s")) is ceilings.read
    assert ceilings.of(dataclasses.replace(case, integer=False)) is ceilings.multiply


def test_time_ends_a_case_after_three_rounds(timing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    assert len(timing.time_by_turns([clock.runner(timing, "a", [1.0] * 9)], rounds=8, seconds=4.5)[0]) == 5
    assert len(timing.time_by_turns([clock.runner(timing, "a", [1.0] * 9)], rounds=8, seconds=0.0)[0]) == 3


@pytest.fixture
def search(timing: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Searches the tile of a kernel that is as fast as a function of it says, on an H100 that is not there."""
    from bench import tuning as bench_tuning

    from hsai_kernels import capabilities

    refused = {"kernel": "k", "dtype": "float32", "shape": "s", "case": "c", "chip": "h100", "outcome": "refused"}
    monkeypatch.setattr(capabilities, "FOLDER", tmp_path)
    capabilities.write_capabilities(
        "gpu", "ptxas 1", [refused | {"tile": {"rows": 64, "keys": 16}, "reason": "no room"}]
    )
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)

    def run_search(take: Callable[[int, int], float]) -> tuple[Any, Any, list[tuple[int, int]]]:
        ran = []

        def build() -> Callable[[], object]:
            tile = tuning.choose_tile("k", dtype="float32", shape="s", own={"rows": 32, "keys": 16})
            sides = tile["rows"], tile["keys"]
            if sides[1] < 4:
                raise ValueError(f"keys={sides[1]} is no block")

            def run() -> None:
                ran.append(sides)
                clock.now += take(*sides)

            return run

        runner = timing.Runner(name="ours", build=build)
        case = timing.Case(name="x", nbytes=1, flops=1, metric="GB/s", ours=runner)
        with compile_for("gpu", "NVIDIA H100 80GB HBM3"):
            tiles, found = bench_tuning.find_tiles(case, rounds=3, seconds=1e9)
        return tiles, found, ran

    return run_search


def test_tuning_climbs_to_the_fastest_tile_and_never_runs_a_refused_one(
    search: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    # The nearest is at 64 rows and 4 keys; the way over 64 x 16 is barred by the capability table.
    tiles, case, ran = search(lambda rows, keys: 1 + abs(rows - 64) / 64 + abs(keys - 4) / 64)
    assert tiles == {("k", "float32", "s"): {"rows": 64, "keys": 4}}
    assert [peer.name for peer in case.peers] == ["tiles as they were"]
    assert (64, 16) not in ran and {(32, 16), (64, 8), (64, 4)} <= set(ran)
    printed = capsys.readouterr().out
    assert "rows 64 keys 16: has no tile of 64 rows, 16 keys in k: h100: refused (no room)" in printed
    assert "rows 64 keys 2: keys=2 is no block" in printed


def test_tuning_leaves_a_tile_alone_that_nothing_beats(search: Any) -> None:
    tiles, case, ran = search(lambda rows, keys: 1 + abs(rows - 32) + abs(keys - 16))
    assert tiles == {} and case.peers == [] and len(set(ran)) == 4
    assert search(lambda rows, keys: 1 - 0.0001 * rows)[0] == {}  # no more than noise


def test_peers_compute_what_ours_does(timing: Any) -> None:
    from bench import attention, layers

    cases = [
        *(attention._make_forward(cache, 2, queries, 16, 4, 2) for cache, queries in (("float32", 16), ("int8", 1))),
        attention._make_paged("int4", 2, 32, 4, 2, 64),
        *layers.make_cross_entropy(quick=True),
        *layers.make_rope(quick=True),
    ]
    for case in cases:
        assert case.peers[0].name.startswith("xla"), case.name
        for peer in case.peers:
            for ours, theirs in zip(*map(jax.tree.leaves, (case.ours.run(), peer.run())), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4, err_msg=f"{case.name}, {peer.name}")


@pytest.mark.slow
def test_the_script_measures_and_writes_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "scripts/bench_kernels.py", "--quick", "--ops", "cross_entropy", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "% of GFLOP/s" in done.stdout and "peer onnxruntime: " in done.stdout
    found = json.loads(out.read_text())
    assert [row["peer_name"] for row in found["rows"]] == [None, "xla", "reference"]
    assert all(list(row) == KEYS for row in found["rows"])
    assert found["rows"][1]["ours"] > 0 and found["rows"][1]["n"] >= 3
    assert "--ops cross_entropy" in found["machine"]["command"] and found["complete"] is True


def test_a_record_is_complete_only_at_the_end(timing: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import bench_kernels

    def make_cases(quick: bool) -> Iterator[Any]:
        for name in "ab":
            runner = timing.Runner(name="ours", build=lambda: lambda: None)
            yield timing.Case(name=name, nbytes=1, flops=1, metric="GB/s", ours=runner)
        if quick:
            raise KeyboardInterrupt

    out = tmp_path / "rows.json"
    command = ["bench_kernels.py", "--ops", "decode", "--json", str(out)]
    nothing = timing.Probe(amount=1.0, runner=timing.Runner(name="nothing", build=lambda: lambda: None))
    ceilings = timing.Ceilings(read=nothing, multiply=nothing, multiply_integers=None)
    monkeypatch.setattr(bench_kernels, "make_ceilings", lambda: ceilings)
    monkeypatch.setitem(bench_kernels.OPS, "decode", make_cases)
    monkeypatch.setattr(sys, "argv", [*command, "--quick"])
    with pytest.raises(KeyboardInterrupt):
        bench_kernels.main()
    found = json.loads(out.read_text())
    assert [row["case"] for row in found["rows"]] == ["a", "b"] and "complete" not in found
    monkeypatch.setattr(sys, "argv", command)
    bench_kernels.main()
    assert json.loads(out.read_text())["complete"] is True


def test_an_unknown_op_is_refused() -> None:
    command = [sys.executable, "scripts/bench_kernels.py", "--ops", "fast"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "invalid choice: 'fast'" in done.stderr
