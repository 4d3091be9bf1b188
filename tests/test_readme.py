"""What README.md and docs/inference.md show is run as it stands, on tiny models; the README has the measured table."""

import re
from pathlib import Path
from typing import Any

import pytest

from hsai.cli import main
from hsai.export import write_bundle
from hsai.files import read_json
from scripts import write_results
from scripts.write_results import BEGIN, END, QUICKSTART, replace_between, write_table
from tests.export.tiny_models import CHATTY_ASSETS, make_chatty_tokenizer, make_model

ROOT = Path(__file__).resolve().parent.parent


def test_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"<!-- tested by tests/test_readme.py -->\n```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    assert (
        main(["train", str(ROOT / "configs" / "tiny.py"), "--directory", "runs/quickstart", "--train.steps", "4"]) == 0
    )
    capsys.readouterr()
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "runs" / "mine" / "manifest.json").exists()


def test_python_of_the_page_on_inference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One block after the other, as a reader would; `texts` are the reader's own."""
    page = (ROOT / "docs" / "inference.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    write_bundle(tmp_path / "bundles" / "int4", make_model("int4"), make_chatty_tokenizer(), assets=CHATTY_ASSETS)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"texts": ["def main", "import"]}
    said = []
    for example in examples:
        exec(compile(example, "docs/inference.md", "exec"), names)
        said.append(capsys.readouterr().out)
    assert re.search(r" (end_of_text|max_tokens|context) [\d.]+ 0\n$", said[0])
    done = names["done"]
    assert done.text.startswith("{") and len(done.logprobs) == len(done.tokens) and len(done.logprobs[0].top) == 3
    assert said[1] and names["service"].stats().finished["failed"] == 0


def test_table_is_the_measured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    text = (ROOT / "README.md").read_text()
    assert BEGIN in text and END in text
    assert replace_between(text, write_table(read_json(QUICKSTART))) == text, "run scripts/write_results.py"
    page = (ROOT / "docs" / "results.md").read_text()
    for name in ("table", "kernels", "decoding", "serving", "evaluation", "perplexity", "frontier"):
        file = QUICKSTART if name == "table" else getattr(write_results, name.upper())
        assert getattr(write_results, f"write_{name}")(read_json(file)) in page, (
            f"{file.name}: run scripts/write_results.py"
        )


def test_a_new_measurement_takes_the_place_of_the_same_cases() -> None:
    def run(command: str, kernels: str = "avx512", **cases: int) -> dict[str, Any]:
        rows = [{"case": case, "ours": time} for case, time in cases.items()]
        return {"machine": {"command": command, "cpu_kernels": kernels}, "rows": rows}

    def merge(kept: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
        return write_results.replace_rows(kept, new, "rows", ("cpu_kernels", "case"))

    runs = merge([], run("all", a=1, b=2))
    runs = merge(runs, run("some", b=3, c=4))
    assert runs == [run("all", a=1), run("some", b=3, c=4)]
    assert merge(runs, run("again", a=5)) == [run("some", b=3, c=4), run("again", a=5)]
    assert merge(runs, run("elsewhere", "avx2", a=5)) == [*runs, run("elsewhere", "avx2", a=5)]


def test_a_record_of_kernels_that_was_cut_off_says_so() -> None:
    run: dict[str, Any] = {"machine": {"command": "all"}, "rows": []}
    assert "This record was cut off" in write_results.write_kernels([run])
    assert "cut off" not in write_results.write_kernels([run | {"complete": True}])
    kept = write_results.replace_rows([], run | {"rows": [{"case": "a"}], "complete": True}, "rows", ("case",))
    assert kept[0]["complete"]


def test_models_that_were_measured_on_other_texts_stand_in_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench.frontier import group_runs

    row = {"dense": "d", "model": "a", "side": "hsai", "n": 8}
    runs = [{"calibration": "c", "text": "t", "tokens_sha256": of, "frontier": [row]} for of in ("x", "y")]
    with pytest.raises(ValueError, match="models of d were measured on different texts"):
        group_runs(runs)
    # Those of another model may be: they stand in a table of their own.
    assert list(group_runs([runs[0], runs[1] | {"frontier": [row | {"dense": "e"}]}])) == ["d", "e"]


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https://)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
