"""The bench of whole models: what stands beside what, and peers that take no time while it is not their turn."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from hsai.export.source import ModelSource
from tests.export.tiny_models import make_model, make_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import bench.decoding
    import bench.processes

    return bench


def count(path: Path) -> Callable[[], object]:
    """Writes how often it ran to a file."""
    ran = 0

    def run() -> None:
        nonlocal ran
        ran += 1
        path.write_text(f"{ran} {os.getpid()} {os.environ.get('WANTED')}")

    return run


def fail(early: bool) -> Callable[[], object]:
    def run() -> None:
        raise ValueError("no such tensor")

    if early:
        run()
    return run


def test_a_peer_runs_only_when_it_is_asked(bench: Any, tmp_path: Path) -> None:

    out = tmp_path / "ran"
    peer = bench.processes.Apart(functools.partial(count, out), {"WANTED": "spinning"})
    assert not out.exists() and "WANTED" not in os.environ
    for ran in (1, 2):
        peer()
        number, pid, wanted = out.read_text().split()
        assert (int(number), wanted) == (ran, "spinning") and int(pid) != os.getpid()
        for _ in range(100):  # the signal is on its way
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "T":
                break
            time.sleep(0.01)
        assert state == "T"
    del peer
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("early", [True, False])
def test_what_goes_wrong_there_is_told_here(early: bool, bench: Any) -> None:

    with pytest.raises(RuntimeError, match="no such tensor"):
        bench.processes.Apart(functools.partial(fail, early), {})()


def test_ours_alone(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without peers: decoding, with the share of it outside of kernels, a prompt, and two streams."""
    for name, value in (("READ", 8), ("WRITTEN", 4), ("PROMPT", 16)):
        monkeypatch.setattr(bench.decoding, name, value)
    model = make_model("dense")
    fields = {field.name: None for field in dataclasses.fields(ModelSource)}
    source = ModelSource(**fields | {"model": model, "tokenizer": make_tokenizer()})  # type: ignore[arg-type]
    contest = bench.decoding.Contest(
        name="tiny",
        source=source,
        formats=("int4",),
        activations=("float", "int8"),
        alone=(),
        together=(),
        streams=(2,),
    )
    from bench.ceilings import make_ceilings
    from bench.timing import measure

    ceilings = make_ceilings()
    with jax.default_matmul_precision("float32"):
        cases = list(contest.make_cases())
        assert [case.name for case in cases] == [
            f"tiny {kind}int4 {work}" for kind in ("", "int8 x ") for work in ("decode", "prefill 16", "2 streams")
        ]
        decode, prefill = cases[3], cases[4]
        (row,) = measure(decode, ceilings, rounds=3, seconds=1.0)
        assert 0 < row["outside_of_kernels"] < 1 and "outside of kernels" in decode.explain([row])
        assert 0 < row["percent_of_ceiling"] < 100
        (row,) = measure(prefill, ceilings, rounds=3, seconds=1.0)
        assert "outside_of_kernels" not in row
    blocks, head = bench.decoding.list_products(bench.decoding.pack_model(model, bench.decoding.FORMATS["int4"]))
    assert decode.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves((blocks, head)))
