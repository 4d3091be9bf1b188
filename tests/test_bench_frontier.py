"""The frontier's bench on a tiny model: both sides read the same tokens, and what is smaller is counted as smaller."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hsai.cli import main
from hsai.compress.calibration import CalibrationConfig, digest_windows, draw_windows
from hsai.configuration import to_dict
from hsai.evaluate import Pair
from hsai.interop.gguf_write import write_gguf
from tests.interop.gguf_files import CONFIGS, random_model, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "sleeps", "def main():", "return 42", "\n")


@pytest.mark.slow
def test_models_of_both_sides_lie_where_they_belong(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS["llama"], max_length=1024)
    write_gguf(tmp_path / "model.gguf", random_model(config), train_tokenizer(), dtype="f32")
    draw = np.random.default_rng(0)
    for name, count in (("calibration.txt", 50_000), ("heldout.txt", 400)):
        (tmp_path / name).write_text(" ".join(draw.choice(WORDS, count)))
    recipe = ROOT / "configs" / "compress" / "int8.py"
    assert (
        main(["compress", str(tmp_path / "model.gguf"), "--recipe", str(recipe), "--out", str(tmp_path / "ours")]) == 0
    )

    def measure(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "scripts/bench_frontier.py", str(tmp_path / "model.gguf"), str(tmp_path / "ours")]
        texts = ["--calibration", str(tmp_path / "calibration.txt"), "--text", str(tmp_path / "heldout.txt")]
        return subprocess.run([*command, *texts, *words], cwd=ROOT, capture_output=True, text=True, check=False)

    out = tmp_path / "frontier.json"
    done = measure("--kinds", "Q8_0", "Q8_0/Q4_0", "Q4_0", "--window", "128", "--chunks", "3", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert (found["calibration"], found["text"]) == ("calibration.txt", "heldout.txt")
    assert {row["dense"] for row in found["frontier"]} == {"model.gguf"}
    rows: dict[str, Any] = {row["model"]: row for row in found["frontier"]}
    assert [(name, row["side"]) for name, row in rows.items()] == [
        ("F32", "llama.cpp"),
        ("dense", "hsai"),
        ("ours", "hsai"),
        ("Q8_0", "llama.cpp"),
        ("Q8_0/Q4_0", "llama.cpp"),
        ("Q4_0", "llama.cpp"),
    ]
    assert rows["dense"]["perplexity"] == pytest.approx(rows["F32"]["perplexity"], rel=1e-3)
    assert rows["ours"]["perplexity"] == pytest.approx(rows["dense"]["perplexity"], rel=0.02)
    assert rows["ours"]["perplexity"] != rows["dense"]["perplexity"]
    assert len({row["n"] for row in rows.values()}) == 1 and rows["dense"]["n"] > 100
    assert rows["ours"]["recipe"] == "int8" and rows["dense"]["rounded"] is None
    assert rows["ours"]["rounded"] == pytest.approx(rows["ours"]["perplexity"], rel=0.02)
    assert rows["ours"]["rounded"] != rows["ours"]["perplexity"]
    assert rows["dense"]["bits_per_weight"] == 32.0
    for row in rows.values():
        own = rows["dense" if row["side"] == "hsai" else "F32"]
        assert row["ratio"] == pytest.approx(row["perplexity"] / own["perplexity"], rel=1e-9)
    # Token by token: far less than by the errors of both.
    assert 0 < rows["ours"]["ratio_standard_error"] < 0.2 * rows["ours"]["standard_error"] / rows["ours"]["perplexity"]
    assert rows["dense"]["ratio"] == 1 and rows["F32"]["ratio_standard_error"] == 0
    assert 8 < rows["ours"]["bits_per_weight"] < 9 and 8 < rows["Q8_0"]["bits_per_weight"] < 10
    assert (
        rows["Q4_0"]["bytes"]
        <= rows["Q8_0/Q4_0"]["bytes"]
        < rows["Q8_0"]["bytes"]
        < rows["F32"]["bytes"]
        == rows["dense"]["bytes"]
    )


def test_kinds_are_those_of_llama_quantize(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench.llama_quantize import read_kind

    assert [read_kind(text) for text in ("Q4_K_M", "IQ2_XS/IQ4_NL")] == ["Q4_K_M", "IQ2_XS/IQ4_NL"]
    for text in ("Q4_9", "Q4_K_M/", "Q4_K_M/Q2_K", "/Q4_0"):
        with pytest.raises(ValueError, match=f"{text!r} is none of Q8_0, .* /IQ4_NL"):
            read_kind(text)


def test_who_saw_other_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench.frontier import check_calibration, choose_chunks, digest

    stream = np.random.default_rng(0).integers(0, 500, 4000).astype(np.int32)
    config = CalibrationConfig(tokens=512, sequence_length=64, batch=4, seed=3)
    seen = digest_windows(draw_windows(stream, config))
    origin = {"recipe": {"calibration": to_dict(config)}, "calibration_sha256": seen}
    check_calibration("mine", origin, stream)
    check_calibration("plain", {"recipe": {"calibration": None}}, stream)
    with pytest.raises(ValueError, match="mine was calibrated on other tokens"):
        check_calibration("mine", origin, stream[1:])
    # What it was made of, and what training began from, saw them too.
    entry = {"directory": "/models/first", "sha256": "ab", "origin": origin}
    for later in ({"made_of": entry}, {"sources": {"initialize_from": entry, "teacher": entry}}):
        check_calibration("mine", {"recipe": {"calibration": None}} | later, stream)
        with pytest.raises(ValueError, match="mine was calibrated on other tokens"):
            check_calibration("mine", {"recipe": {"calibration": None}} | later, stream[1:])
    check_calibration("mine", {"sources": {"teacher": entry}}, stream[1:])
    pairs = [Pair(context=[1], continuation=[7] * 30), Pair(context=[1], continuation=stream[70:99].tolist())]
    assert choose_chunks(pairs, 2, stream) == pairs[:1]
    many = [Pair(context=[1], continuation=[500 + i] * 30) for i in range(10)]
    assert choose_chunks(many, 3, stream) == [many[0], many[3], many[6]]
    assert choose_chunks(many, 20, stream) == many
    assert digest(pairs) != digest(pairs[:1]) and digest(pairs) == digest(list(pairs))
