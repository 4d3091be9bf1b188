"""`hsai compress` after a run that did not come to its end: what is found again, refused, thrown away."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hsai.cli import main
from hsai.compress import resume, scaling
from hsai.compress.folds import Fold
from hsai.compress.resume import Workbench
from hsai.errors import InputError
from hsai.export.bundle import read_bundle
from tests.cli.conftest import CALIBRATED, Workshop
from tests.cli.snapshots import snapshot

Refuse = Callable[..., str]


def test_unfinished_work_of_others_is_refused_or_told(
    workshop: Workshop, place: Path, refuse: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "mine.py").write_text(CALIBRATED)
    words = ("compress", str(workshop.run), "--recipe", "mine.py", "--out", "out")
    bench = place / ".out.partial"
    bench.mkdir()
    (bench / "thesis.txt").write_text("years")
    refuse(*words, names=(".out.partial", "holds something else (no record.json)"))
    (bench / "thesis.txt").unlink()
    with Workbench(bench, {"commit": "of old"}):
        (bench / "layer_0000.json").write_text("{}")
        refuse(*words, names=(".out.partial is in use by another run",))
        # Of the second of two recipes as well, before the first one's work.
        (place / "out.py").write_text(CALIBRATED)
        several = (*words[:-1], ".", "--recipe", "mine.py", "out.py")
        refuse(*several, "--calibration", "nowhere.txt", names=(".out.partial is in use by another run",))
    assert main(list(words)) == 0
    told = (
        "was left by a run that differed in commit, source_sha256, recipe, sources_sha256, calibration_sha256, hsai: "
    )
    assert f"{told}1 solved layer discarded" in " ".join(capsys.readouterr().out.split())
    assert not bench.exists() and read_bundle(place / "out").manifest.extra["recipe_name"] == "mine"


def test_a_bundle_is_replaced_from_within(workshop: Workshop, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--out . is the working directory, and unfinished work stands beside it."""
    (place / "mine.py").write_text(CALIBRATED)
    for at, out in (("made", "."), ("made/sub", "..")):
        shutil.rmtree(place / "made", ignore_errors=True)
        shutil.copytree(workshop.compressed / "bf16", place / "made")
        (place / at).mkdir(exist_ok=True)
        monkeypatch.chdir(place / at)
        words = ["compress", str(workshop.run), "--recipe", str(place / "mine.py"), "--out", out, "--overwrite"]
        assert main(words) == 0
        monkeypatch.chdir(place)
        assert read_bundle(place / "made").manifest.extra["recipe_name"] == "mine"
        assert sorted(path.name for path in place.iterdir()) == ["made", "mine.py"]


KILL = """
import os
import signal
from hsai.compress import resume

write = resume.write_json_atomic

def kill(path, content):
    if path.name == os.environ.get("HSAI_TEST_KILLED_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)

resume.write_json_atomic = kill
"""


def test_a_killed_process_ends_in_the_same_bundle(
    workshop: Workshop, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL between the two files of the second layer: the first is found, the half of the second is not taken."""
    (place / "mine.py").write_text(CALIBRATED + KILL)
    monkeypatch.setattr(resume, "write_json_atomic", resume.write_json_atomic)  # the recipe changes it here too
    words = ["compress", str(workshop.run), "--recipe", "mine.py", "--out"]
    before = snapshot(workshop.run)
    killed = subprocess.run(
        [sys.executable, "-m", "hsai.cli", *words, "out"],
        env={**os.environ, "HSAI_TEST_KILLED_AT": "layer_0001.json"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {path.name for path in (place / ".out.partial").glob("layer_*")}
    assert left == {"layer_0000.json", "layer_0000.safetensors", "layer_0001.safetensors"}
    assert not (place / "out").exists() and snapshot(workshop.run) == before
    assert main([*words, "out"]) == 0
    assert "resuming mine, of 2 layers: 1 solved layer" in " ".join(capsys.readouterr().out.split())
    assert main([*words, "whole"]) == 0
    made, whole = (json.loads((place / name / "manifest.json").read_text()) for name in ("out", "whole"))
    assert made["files"] == whole["files"]  # to the byte
    assert made["extra"]["ledger"] == whole["extra"]["ledger"] and not (place / ".out.partial").exists()


SCALING_RECIPE = """
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig, Rule
from hsai.compress.scaling import ScalingConfig
from hsai.formats import Int4Config

def get_config():
    return RecipeConfig(
        rules=(Rule(pattern="layers.*", format=Int4Config()),),
        transforms=(ScalingConfig(steps=2),),
        calibration=CalibrationConfig(tokens=512, sequence_length=64, batch=4),
    )
"""


def test_a_killed_search_of_scales_ends_in_the_same_bundle(
    workshop: Workshop, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "mine.py").write_text(SCALING_RECIPE)
    words = ["compress", str(workshop.run), "--recipe", "mine.py", "--out"]
    begun: list[str] = []
    real = scaling.measure_channels

    def count(fold: Fold, *arguments: Any) -> Any:
        begun.append(fold.source)
        if len(begun) == last:
            raise KeyboardInterrupt
        return real(fold, *arguments)

    monkeypatch.setattr(scaling, "measure_channels", count)
    last = 7  # of two layers with four folds each
    assert main([*words, "out"]) == 128 + signal.SIGINT
    found = sorted(path.name for path in (place / ".out.partial").glob("scales_*"))
    assert found == ["scales_0000.json", "scales_0000.safetensors"]
    begun.clear()
    last = 0
    assert main([*words, "out"]) == 0
    assert len(begun) == 4 and not (place / ".out.partial").exists()
    assert main([*words, "whole"]) == 0
    made, whole = (json.loads((place / name / "manifest.json").read_text()) for name in ("out", "whole"))
    assert made["files"] == whole["files"]  # to the byte
    assert made["extra"]["ledger"] == whole["extra"]["ledger"] and len(made["extra"]["ledger"]["scales"]) == 8
    # What is rounded by itself has an error of its outputs as well, where there is text to measure it on.
    errors = [row["output_error"] for row in made["extra"]["ledger"]["layers"]]
    assert len(errors) == 2 * 7 and all(0 < error < 0.3 for error in errors)


def test_a_record_names_commit_and_sources(workshop: Workshop, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another commit's solver left, or the same one's with other files, is not mixed into what this one makes."""
    (place / "mine.py").write_text(CALIBRATED)
    records: list[dict[str, object]] = []

    def keep(*arguments: object, **words: object) -> None:
        records.append(json.loads((place / ".out.partial" / "record.json").read_text()))
        raise InputError("enough")

    monkeypatch.setattr("hsai.cli.compress.compress", keep)
    words = ["compress", str(workshop.run), "--recipe", "mine.py", "--out", "out"]
    for commit in ("one", "two"):
        monkeypatch.setattr("hsai.machine.find_commit", lambda commit=commit: commit)
        assert main(words) == 2
    monkeypatch.setattr("hsai.cli.compress.digest_sources", lambda: "others")
    assert main(words) == 2
    assert [record["commit"] for record in records] == ["one", "two", "two"]
    assert {**records[0], "commit": "two"} == records[1]
    assert {**records[1], "sources_sha256": "others"} == records[2] != records[1]
