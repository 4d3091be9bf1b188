"""The kernels' bench: what its rows say, checked with a clock that is made up, and one run of the whole script."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    ceilings = timing.Ceilings(read=8.0, multiply=4.0, multiply_integers=None)
    time_row, row = rows = timing.measure(case, ceilings, rounds=3, seconds=1e9)
    assert clock.order == ["ours", "peer"] + ["ours", "peer", "peer", "ours", "peer", "ours"]
    assert all(list(r) == KEYS for r in rows)
    assert (time_row["metric"], time_row["ours"], time_row["ceiling"]) == ("us", 2e6, 0.5e6)
    assert time_row["percent_of_ceiling"] == 25.0 and time_row["spread"] == [4e6, 1e6]
    assert (row["ours"], row["peer"], row["peer_name"], row["ratio"]) == (2.0, pytest.approx(2 / 3), "peer", 3.0)
    assert (row["ceiling"], row["percent_of_ceiling"], row["spread"], row["n"]) == (8.0, 25.0, [1.0, 4.0], 3)
    assert "25.0% of GB/s" in timing.write_line(case, rows, ceilings) and "peer 3.00x" in timing.write_line(
        case, rows, ceilings
    )


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
    for integers in (16.0, None):
        ours, peer = (clock.runner(timing, name, [1.0] * 4) for name in ("ours", "peer"))
        case = timing.Case(
            name="x", nbytes=10**9, flops=4 * 10**9, metric="GFLOP/s", ours=ours, peers=[peer], integer=True
        )
        ceilings = timing.Ceilings(read=8.0, multiply=2.0, multiply_integers=integers)
        rows = timing.measure(case, ceilings, rounds=3, seconds=1e9)
        found.append([(row["ceiling"], row["percent_of_ceiling"]) for row in rows])
        assert ("25.0% of GFLOP/s" if integers else " – of GFLOP/s") in timing.write_line(case, rows, ceilings)
    assert found == [[(0.25e6, 25.0), (16.0, 25.0)], [(None, None), (None, None)]]
    assert ceilings.of(dataclasses.replace(case, metric="GB/s")) == 8.0
    assert ceilings.of(dataclasses.replace(case, integer=False)) == 2.0


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


@pytest.fixture
def llama(timing: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    from bench import llama

    monkeypatch.setattr(llama, "LAYERS", 2)
    return llama


def test_a_model_is_the_products_of_all_its_layers(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "find_absent", lambda packages: "llama_cpp: not here")
    monkeypatch.setattr(llama, "PRODUCTS", {"attn_q": (256, 128), "attn_k": (256, 64), "ffn_down": (512, 256)})
    decode, prefill, *others = llama.make_model((1, 128), quick=False)
    weights = 2 * (256 * 128 + 256 * 64 + 512 * 256)
    assert (decode.flops, prefill.flops) == (2 * weights, 128 * 2 * weights)
    assert decode.nbytes == prefill.nbytes == weights * 4.25 / 8  # a bfloat16 scale for 64
    assert [case.metric for case in (decode, prefill)] == ["GB/s", "GFLOP/s"]
    names = ["int8 x int4", "2:4 int4", "int8 x 2:4 int4", "64:2:8 int4", "int8 x 64:2:8 int4"]
    assert [case.name.split(",")[0] for case in others[::2]] == [f"model {name}" for name in names]
    assert decode.ours.run() is not None
    assert decode.peers == [] and "absent" in decode.explain([{"ours": 1.0}])


def test_llamas_own_rates_count_all_that_it_does(llama: Any) -> None:
    """A token that takes llama.cpp 0.1 s, and our products half of that."""
    weights = 2 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632)
    rows = [{"ours": 0.05e6}, {"ours": 2.0, "peer": 1.0, "ratio": 2.0}]
    words = llama._explain(2, 1, rows)
    assert "10.0 tokens/s" in words and "ours take 50.0% of its time" in words
    assert f"{(weights + 2048 * 512) * 18 / 32 / 0.1 / 1e9:.2f} GB/s" in words
    assert f"{2 * (weights + 2048 * 512) / 0.1 / 1e9:.1f} GFLOP/s" in words


@pytest.mark.slow
def test_llama_runs_the_file_that_is_written_for_it(llama: Any, tmp_path: Path) -> None:
    absent = llama.find_absent(llama.PACKAGES)
    if absent is not None:
        pytest.skip(f"{absent}: pip install '.[peers]'")
    model = llama._load_model(tmp_path / "model.gguf", 2)
    for rows in (1, 128):
        runner = llama._make_llama(lambda: model, rows)
        runner.run()
        runner.run()
        assert model.n_tokens == (2 * llama.DECODED if rows == 1 else rows)
    assert runner.times == 1 and model.n_vocab() == 512
    logits = np.ctypeslib.as_array(model._ctx.get_logits(), (512,))
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 100


@pytest.mark.slow
def test_the_script_measures_and_writes_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "scripts/bench_kernels.py", "--quick", "--ops", "cross_entropy", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "ceilings: reading" in done.stdout and "peer onnxruntime: " in done.stdout
    found = json.loads(out.read_text())
    assert [row["peer_name"] for row in found["rows"]] == [None, "reference"]
    assert all(list(row) == KEYS for row in found["rows"])
    assert found["rows"][1]["ours"] > 0 and found["rows"][1]["n"] >= 3
    assert "--ops cross_entropy" in found["machine"]["command"]


def test_an_unknown_op_is_refused() -> None:
    command = [sys.executable, "scripts/bench_kernels.py", "--ops", "fast"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "invalid choice: 'fast'" in done.stderr
