"""Texts that `hsai compress` calibrates on or measures by, and batches of them on a mesh."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hsai.cli import main
from hsai.cli.calibrations import check_batches
from hsai.cli.meshes import read_mesh
from hsai.compress import RecipeConfig
from hsai.compress.calibration import CalibrationConfig
from hsai.config_file import load_config
from hsai.errors import InputError
from hsai.evaluate.perplexity import read_text
from hsai.export.bundle import read_bundle
from hsai.export.source import open_model
from tests.cli.conftest import CALIBRATED, Workshop, recipe

ROOT = Path(__file__).resolve().parents[2]
Refuse = Callable[..., str]


def test_calibration_from_a_file(workshop: Workshop, place: Path, refuse: Refuse) -> None:
    (place / "mine.py").write_text(CALIBRATED)
    (place / "long.py").write_text(CALIBRATED.replace("length=64, batch=4", "length=256, batch=2"))
    (place / "text.txt").write_text("def main():\n    return 42\n" * 400)
    (place / "short.txt").write_text("too short")
    (place / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (place / "empty.txt").write_bytes(b"")
    words = ("compress", workshop.run, "--out", "out", "--recipe")
    for given, told in {
        "short.txt": ("recipe mine: calibration.tokens=512 exceeds the text", "give more text"),
        "bytes.txt": ("--calibration: bytes.txt is not text: byte 0",),
        "nowhere.txt": ("--calibration: cannot read nowhere.txt",),
        "empty.txt": ("--calibration: empty.txt holds no text",),
    }.items():
        refuse(*words, "mine.py", "--calibration", given, names=told)
    long = ("recipe long: calibration.sequence_length=256 exceeds the model's context of ",)
    refuse(*words, "long.py", "--calibration", "text.txt", names=long)
    hashes = []
    for name, more in {"own": [], "file": ["--calibration", "text.txt"]}.items():
        assert main(["compress", str(workshop.run), "--recipe", "mine.py", "--out", name, *more]) == 0
        hashes.append(read_bundle(place / name).manifest.extra["calibration_sha256"])
    assert hashes[0] != hashes[1]


def test_a_text_measures_what_does_not_calibrate(
    workshop: Workshop, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of several recipes each; what is packed is the same to the byte. What is kept has nothing to be measured."""
    (place / "mine.py").write_text(CALIBRATED)
    text = " ".join(str(number) for number in range(20_000))
    (place / "text.txt").write_text(text)
    words = ["compress", str(workshop.run), "--calibration", "text.txt", "--recipe", recipe("int4"), "mine.py"]
    assert main([*words, "--out", "out"]) == 0
    plain, solved = (read_bundle(place / "out" / name).manifest for name in ("int4", "mine"))
    assert plain.files == read_bundle(workshop.compressed / "int4").manifest.files
    assert "measured_sha256" in plain.extra and "calibration_sha256" not in plain.extra
    assert "calibration_sha256" in solved.extra and "measured_sha256" not in solved.extra
    rows = plain.extra["ledger"]["layers"]
    assert [row["layer"] for row in rows] == [0] * 7 + [1] * 7 + [None] and rows[-1]["weight"] == "embed"
    assert all(0 < row["output_error"] < 0.3 for row in rows)
    capsys.readouterr()
    again = ["compress", "out/int4", "--calibration", "text.txt", "--recipe", recipe("int4"), "--out", "kept"]
    assert main(again) == 0
    assert "note: recipe int4: all that it would solve is in its format already" in capsys.readouterr().out
    kept = read_bundle(place / "kept").manifest.extra
    assert "layers" not in kept["ledger"] and "measured_sha256" not in kept


def test_calibration_tokens_are_those_of_the_bytes(
    workshop: Workshop, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CRLF too: what llama.cpp is calibrated on by `scripts/bench_frontier.py` is read by the same function."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench.frontier_record import list_calibrations

    (place / "mine.py").write_text(CALIBRATED)
    (place / "text.txt").write_bytes(b"def main():\r\n    return 42\r\n" * 400)
    assert (
        main(["compress", str(workshop.run), "--recipe", "mine.py", "--calibration", "text.txt", "--out", "out"]) == 0
    )
    source = open_model("out")
    stream = np.asarray(source.tokenizer.encode(read_text(Path("text.txt"))), np.int32)
    assert "\r\n" in source.tokenizer.decode(stream)
    assert len(list_calibrations("out", source.origin, stream)) == 1


def test_batches_of_every_recipe_fit_the_meshes_of_eight() -> None:
    paths = sorted((ROOT / "configs" / "compress").glob("*.py"))
    recipes = {path.stem: load_config(path, RecipeConfig).config for path in paths}
    for shape in ("1x8x1", "8x1x1", "2x4x1"):
        check_batches(recipes, read_mesh(shape))


def test_what_fills_no_wider_batches_is_refused() -> None:
    """A batch of 4 is one of 8 on eight devices."""
    tuned, budget = (load_config(recipe(name), RecipeConfig).config for name in ("tuned_int4", "budget"))
    short = CalibrationConfig(tokens=12 * 64, sequence_length=64, batch=4)
    mesh = read_mesh("2x4x1")
    told = "recipe mine: the 12 windows of calibration.tokens=768 are no whole batches of 8, .* a multiple of 512"
    with pytest.raises(InputError, match=told):
        check_batches({"mine": dataclasses.replace(tuned, calibration=short)}, mesh)
    assert budget.allocation is not None
    odd = dataclasses.replace(budget.allocation, windows=4)
    told = "recipe mine: allocation.windows=4 are no whole batches of 8, .*; let it be a multiple of 8"
    with pytest.raises(InputError, match=told):
        check_batches({"mine": dataclasses.replace(budget, allocation=odd)}, mesh)
