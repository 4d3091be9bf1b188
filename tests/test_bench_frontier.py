"""The frontier's bench on a tiny model: both sides read the same tokens, and what is smaller is counted as smaller."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hsai.cli import main
from hsai.compress.calibration import CalibrationConfig, digest_windows, draw_windows
from hsai.configuration import to_dict
from hsai.errors import InputError
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
    words = ("--kinds", "Q8_0", "Q8_0/Q4_0", "Q4_0", "--window", "128", "--chunks", "3", "--json", str(out))
    done = measure(*words)
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
    assert found["complete"] is True and found["importance"] == to_dict(CalibrationConfig())
    assert {name for name, row in rows.items() if row["calibration_tokens"]} == {"Q8_0", "Q8_0/Q4_0", "Q4_0"}
    manifest = json.loads((tmp_path / "ours" / "manifest.json").read_text())["extra"]
    assert rows["ours"]["commit"] == manifest["commit"]
    assert rows["ours"]["date"] == manifest["cost"]["machine"]["date"] is not None

    # Cut off after its fourth line, it goes on with the fifth; the fourth is not measured again.
    rows["Q8_0"]["perplexity"] = 7.0
    out.write_text(json.dumps(found | {"frontier": found["frontier"][:4]}))
    done = measure(*words, "--resume")
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["frontier"] == list(rows.values())

    done = measure(*words[:1], "--window", "128", "--chunks", "3", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [row["model"] for row in found["frontier"]] == ["F32", "dense", "ours"] and found["importance"] is None

    (tmp_path / "calibration.txt").write_text("the quick brown fox")
    out.unlink()
    done = measure(*words)
    assert done.returncode == 2 and not out.exists()
    assert re.search("^error: calibration.tokens=65536 exceeds the text, which has .* tokens", done.stderr, re.M)


def test_kinds_are_those_of_llama_quantize(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench.llama_quantize import read_kind

    assert [read_kind(text) for text in ("Q4_K_M", "IQ2_XS/IQ4_NL")] == ["Q4_K_M", "IQ2_XS/IQ4_NL"]
    for text in ("Q4_9", "Q4_K_M/", "Q4_K_M/Q2_K", "/Q4_0"):
        with pytest.raises(ValueError, match=f"{text!r} is none of Q8_0, .* /IQ4_NL"):
            read_kind(text)


def test_who_saw_another_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench.frontier_record import choose_calibration, list_calibrations

    stream = np.random.default_rng(0).integers(0, 500, 4000).astype(np.int32)
    config = CalibrationConfig(tokens=512, sequence_length=64, batch=4, seed=3)
    seen = digest_windows(draw_windows(stream, config))
    origin = {"recipe": {"calibration": to_dict(config)}, "calibration_sha256": seen}
    assert list_calibrations("mine", origin, stream) == [config]
    assert list_calibrations("plain", {"recipe": {"calibration": None}}, stream) == []
    for other in (stream[1:], stream[:500]):  # the second has not as many tokens as that bundle read
        with pytest.raises(InputError, match="mine was calibrated on another text"):
            list_calibrations("mine", origin, other)
    # What it was made of, and what training began from, saw text too.
    entry = {"directory": "/models/first", "sha256": "ab", "origin": origin}
    for later in ({"made_of": entry}, {"sources": {"initialize_from": entry, "teacher": entry}}):
        plain = {"recipe": {"calibration": None}} | later
        assert list_calibrations("mine", plain, stream) == [config]
        assert list_calibrations("mine", origin | later, stream) == [config, config]
        with pytest.raises(InputError, match="mine was calibrated on another text"):
            list_calibrations("mine", plain, stream[1:])
    assert list_calibrations("mine", {"sources": {"teacher": entry}}, stream[1:]) == []
    # llama.cpp gets what all of ours got, or what the one got that saw most.
    assert choose_calibration([config, config]) == config
    more = dataclasses.replace(config, tokens=1024, seed=0)
    assert choose_calibration([config, more, config]) == more
    assert choose_calibration([]) == CalibrationConfig()


def test_chunks_stand_in_no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench.frontier_record import choose_chunks, digest

    stream = np.random.default_rng(0).integers(0, 500, 4000).astype(np.int32)
    pairs = [Pair(context=[1], continuation=[7] * 30), Pair(context=[1], continuation=stream[70:99].tolist())]
    assert choose_chunks(pairs, 2, stream) == pairs[:1]
    many = [Pair(context=[1], continuation=[500 + i] * 30) for i in range(10)]
    assert choose_chunks(many, 3, stream) == [many[0], many[3], many[6]]
    assert choose_chunks(many, 20, stream) == many
    assert digest(pairs) != digest(pairs[:1]) and digest(pairs) == digest(list(pairs))


def test_a_record_is_whole_after_every_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench.frontier_record import FrontierRecord

    path = tmp_path / "frontier.json"
    header: dict[str, Any] = dict.fromkeys(("calibration", "importance", "text", "tokens_sha256", "dense_sha256"), "x")
    header |= {"sources_sha256": "x", "machine": {"command": "bench", "date": "1"}}

    def row(name: str, side: str, sha256: str | None = None, perplexity: float = 1.0) -> dict[str, Any]:
        return {"model": name, "side": side, "sha256": sha256, "perplexity": perplexity}

    rows = [row("dense", "hsai"), row("a", "hsai", "aa"), row("b", "hsai", "bb"), row("Q4_0", "llama.cpp")]
    first = FrontierRecord(path, header, resumed=False, sha256={})
    for count, one in enumerate(rows):
        first.add(one)
        found = json.loads(path.read_text())
        assert found == header | {"complete": False, "frontier": rows[: count + 1]}
    first.close()
    assert json.loads(path.read_text())["complete"] is True

    later = header | {"machine": {"command": "bench", "date": "2"}}
    again = FrontierRecord(path, later, resumed=True, sha256={"a": "aa", "b": "changed"})
    names = (("dense", "hsai"), ("a", "hsai"), ("b", "hsai"), ("Q4_0", "llama.cpp"), ("Q4_0", "hsai"))
    assert [again.find(*name) for name in names] == [rows[0], rows[1], None, rows[3], None]
    again.add(row("dense", "hsai", perplexity=2.0))
    found = json.loads(path.read_text())
    assert found["machine"]["date"] == "2" and found["complete"] is False
    assert found["frontier"] == [row("dense", "hsai", perplexity=2.0), rows[1], rows[3]]
    for change in ({"importance": "y"}, {"sources_sha256": "y"}, {"machine": {"command": "bench --quick"}}):
        with pytest.raises(InputError, match=f"{path} is of another run: its .* is '(x|bench)', not"):
            FrontierRecord(path, header | change, resumed=True, sha256={})
    anew = FrontierRecord(path, header, resumed=False, sha256={"a": "aa"})
    assert anew.find("a", "hsai") is None


def test_tables_say_how_much_text_each_side_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench.frontier import write_tables

    numbers = {"perplexity": 2.0, "standard_error": 0.1, "bits_per_weight": 4.0, "rounded": None, "recipe": None}
    seen = {("dense", "hsai"): None, ("a", "hsai"): 16384, ("b", "hsai"): 65536, ("F32", "llama.cpp"): None}
    rows = [
        {"dense": "d", "model": model, "side": side, "bytes": 9, "n": 8, "calibration_tokens": tokens, **numbers}
        for (model, side), tokens in (seen | {("Q4_0", "llama.cpp"): 65536}).items()
    ]
    machine = dict.fromkeys(("command", "commit", "processor", "cores", "jax", "date"), "x")
    run = {"machine": machine, "calibration": "c", "text": "t", "tokens_sha256": "s", "frontier": rows}
    text = write_tables([run | {"complete": True}])
    assert "of the same text (65,536 tokens of it, ours 16,384 to 65,536)," in text and "cut off" not in text
    assert "It was cut off before its last line." in write_tables([run | {"complete": False}])
    for row in rows:
        del row["calibration_tokens"]  # a record of before this was told
    assert "of the same text,\n" in write_tables([run])
