"""What README.md shows is run as it stands, on a tiny trained model; its table is the one in docs/results."""

import re
from pathlib import Path

import pytest

from hsai.cli import main
from hsai.files import read_json
from scripts.write_results import BEGIN, END, QUICKSTART, replace_between, write_table

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


def test_table_is_the_measured_one() -> None:
    text = (ROOT / "README.md").read_text()
    assert BEGIN in text and END in text
    assert replace_between(text, write_table(read_json(QUICKSTART))) == text, "run scripts/write_results.py"
    assert write_table(read_json(QUICKSTART)) in (ROOT / "docs" / "results.md").read_text()


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
