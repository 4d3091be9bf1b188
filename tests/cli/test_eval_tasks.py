"""`hsai eval --tasks`: tables, JSON, and what it refuses before anything is measured."""

import json
import re
from pathlib import Path

import pytest

from hsai.cli import main
from tests.cli.conftest import Workshop
from tests.cli.test_eval import Refuse

TEXT = "import os\n\n\ndef main(argv: list[str]) -> int:\n    return len(argv)\n" * 30


def test_perplexity(workshop: Workshop, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two formats side by side, by both definitions, on one device and on a mesh."""
    (place / "code.txt").write_text(TEXT)
    models = [str(workshop.bundles / name) for name in ("bf16", "int4")]
    tasks = "perplexity:code.txt,perplexity_llamacpp:code.txt"
    words = ["eval", *models, "--tasks", tasks, "--window", "32"]
    assert main([*words, "--json", "one.json", "--html", "one.html"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("bf16", "int4", "perplexity:code.txt", "bits_per_byte"))
    one = json.loads((place / "one.json").read_text())
    assert [row["model"] for row in one["rows"]] == ["bf16", "int4"] and one["machine"]["cores"] >= 1
    assert "heldout_loss" not in one["rows"][0]
    dense, int4 = one["evaluations"]
    assert dense["model"] == "bf16" and dense["dtype"] == "float32" and dense["mesh"] is None
    assert int4["weights"]["int4"] > 0 and dense["weights"] == {"dense": sum(dense["weights"].values())}
    assert len(dense["tokenizer"]["sha256"]) == 64 and dense["hsai"] and dense["batch_tokens"] == 2048
    assert dense["commit"] == one["machine"]["commit"]
    assert dense["commit"] is None or re.fullmatch("[0-9a-f]{12,}(-dirty)?", dense["commit"])
    assert 0 < dense["tasks"][0]["metrics"]["perplexity"]["standard_error"] < 1e9
    for first, second in zip(dense["tasks"], int4["tasks"], strict=True):
        assert "kl" not in first["metrics"] and second["metrics"]["kl"]["n"] == second["metrics"]["perplexity"]["n"]
        assert 0 < second["metrics"]["kl"]["value"] < 1 and 0.3 < second["metrics"]["same_choice"]["value"] < 1
        before, after = (task["metrics"]["perplexity"] for task in (first, second))
        assert after["ratio"] == pytest.approx(after["value"] / before["value"], rel=1e-9) and "ratio" not in before
        assert 0 < after["ratio_standard_error"] < 0.5 * after["standard_error"] / before["value"]
        change = f"{after['ratio']:.4f}x ± {after['ratio_standard_error']:.4f}"
        assert change in printed and f"({change})" in (place / "one.html").read_text()
        assert "difference" not in second["metrics"]["kl"]
    windows, chunks = dense["tasks"]
    assert (windows["window"], windows["stride"]) == (32, 32) and chunks["window"] == 32 and "stride" not in chunks
    size = windows["metrics"]["bits_per_byte"]["n"]
    assert size == len(TEXT.encode())
    assert chunks["metrics"]["perplexity"]["n"] == windows["metrics"]["perplexity"]["n"] // 32 * 15
    assert main([*words[:2], *words[3:], "--mesh", "4x1x2", "--json", "mesh.json"]) == 0
    (meshed,) = json.loads((place / "mesh.json").read_text())["evaluations"]
    assert meshed["mesh"] == {"data": 4, "fsdp": 1, "model": 2}
    for ours, theirs in zip(meshed["tasks"], dense["tasks"], strict=True):
        for name, metric in theirs["metrics"].items():
            assert ours["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-5)


def test_caches_side_by_side(workshop: Workshop, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One model with each cache: what it costs to read keys and values through it, against the first."""
    (place / "code.txt").write_text(TEXT)
    words = ["eval", str(workshop.bundles / "bf16"), "--tasks", "perplexity:code.txt", "--window", "32", "--limit", "4"]
    assert main([*words, "--kv-cache", "activations", "int8", "int4", "--json", "a.json", "--html", "a.html"]) == 0
    assert "bf16, int4 cache" in capsys.readouterr().out and "bf16, int8 cache" in (place / "a.html").read_text()
    found = json.loads((place / "a.json").read_text())
    names = ["bf16", "bf16, int8 cache", "bf16, int4 cache"]
    assert [row["model"] for row in found["rows"]] == [each["model"] for each in found["evaluations"]] == names
    assert [each["kv_cache"] for each in found["evaluations"]] == ["activations", "int8", "int4"]
    metrics = [each["tasks"][0]["metrics"] for each in found["evaluations"]]
    assert "kl" not in metrics[0] and 0 < metrics[1]["kl"]["value"] < metrics[2]["kl"]["value"] < 0.1


def test_rounded_activations_are_told(workshop: Workshop, place: Path) -> None:
    (place / "code.txt").write_text(TEXT)
    words = ["eval", str(workshop.bundles / "int4"), "--tasks", "perplexity:code.txt", "--window", "32", "--limit", "4"]
    found = []
    for activations in ("float", "int8"):
        assert main([*words, "--activations", activations, "--json", "a.json"]) == 0
        found += json.loads((place / "a.json").read_text())["evaluations"]
    assert [each["model"] for each in found] == ["int4", "int4, int8 activations"]
    assert [each["activations"] for each in found] == ["float", "int8"]
    exact, rounded = (each["tasks"][0]["metrics"]["perplexity"]["value"] for each in found)
    assert exact != rounded == pytest.approx(exact, rel=0.05) and found[0]["weights"] == found[1]["weights"]


def test_with_held_out_text(workshop: Workshop, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "code.txt").write_text(TEXT)
    words = ["eval", str(workshop.bundles / "bf16"), "--tokens", "500", "--corpus", str(workshop.corpus)]
    assert main([*words, "--tasks", "perplexity:code.txt", "--limit", "2", "--json", "both.json"]) == 0
    both = json.loads((place / "both.json").read_text())
    assert both["rows"][0]["heldout_tokens"] == 500 and both["evaluations"][0]["tasks"][0]["limit"] == 2
    assert "held-out bits/byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--tasks", "hellaswagg"), ("no task 'hellaswagg'", "did you mean hellaswag?")),
        (("--tasks", "perplexity:nowhere"), ("perplexity:nowhere", "no such file")),
        (("--limit", "3"), ("--limit goes with --tasks",)),
        (("--tasks", "piqa", "--html", "nowhere/page.html"), ("--html nowhere/page.html", "does not exist")),
        (("--tasks", "piqa", "--mesh", "2x2"), ("--mesh 2x2", "4x1x2")),
        (("--tasks", "piqa", "--mesh", "3x1x1"), ("mesh data=3", "8")),
        (("--tasks", "piqa", "--mesh", "1x1x8"), ("mesh.model=8", "model.")),
        (("--tasks", "piqa", "--batch-tokens", "0"), ("--batch-tokens 0",)),
        (("--tasks", "piqa", "--few-shot", "-1"), ("--few-shot -1",)),
        (("--tasks", "piqa", "--kv-cache", "int3"), ("--kv-cache", "'int3'", "'int4'")),
        (("--tasks", "piqa", "--kv-cache", "int4", "int4"), ("--kv-cache int4 int4", "twice")),
        (("--tasks", "piqa", "--kv-cache", "int4", "--corpus", "x"), ("--corpus", "--kv-cache")),
    ],
    ids=lambda value: " ".join(value),
)
def test_refused(workshop: Workshop, refuse: Refuse, words: tuple[str, ...], names: tuple[str, ...]) -> None:
    refuse("eval", workshop.bundles / "int4", *words, names=names)


def test_windows_that_do_not_fit(workshop: Workshop, place: Path, refuse: Refuse) -> None:
    (place / "short.txt").write_text("def main")
    model = workshop.bundles / "int4"
    refuse("eval", model, "--tasks", "perplexity_llamacpp:short.txt", names=("does not fill one window",))
    refuse("eval", model, "--tasks", "perplexity:short.txt", "--window", "99999", names=("--window 99999", "context"))
    (place / "empty.txt").write_text("")
    refuse("eval", model, "--tasks", "perplexity:empty.txt", names=("empty.txt", "no text"))
