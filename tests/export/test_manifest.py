"""manifest.json: each way in which it can be wrong is one line that says which."""

import json
from pathlib import Path
from typing import Any

import pytest

from hsai.errors import InputError
from hsai.export.manifest import read_manifest, write_manifest

KEYS = ("created_by", "model", "weights", "tokenizer", "graphs", "files", "extra")
GOOD_RECORD = {"bytes": 1, "sha256": "0" * 64}


def refuse(directory: Path, change: Any) -> str:
    """The line that refuses the manifest of `directory` after `change(content)`."""
    path = directory / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        read_manifest(directory)
    line = str(caught.value)
    assert line.startswith(str(path)) and "\n" not in line
    return line


def test_manifest_is_read_as_it_was_written(plain: Path, tmp_path: Path) -> None:
    manifest = read_manifest(plain)
    write_manifest(tmp_path, manifest)
    assert (tmp_path / "manifest.json").read_bytes() == (plain / "manifest.json").read_bytes()


@pytest.mark.parametrize("key", KEYS)
def test_missing_key_is_named(key: str, copy: Path) -> None:
    assert f"{key} is missing; a manifest has format_version, " in refuse(copy, lambda content: content.pop(key))


@pytest.mark.parametrize("key", KEYS)
def test_value_of_another_type_is_named(key: str, copy: Path) -> None:
    line = refuse(copy, lambda content: content.update({key: 7}))
    assert f"{key}: expected" in line


def test_unknown_key_is_named(copy: Path) -> None:
    assert "signature is unknown" in refuse(copy, lambda content: content.update(signature="x"))


@pytest.mark.parametrize("version", [2, 0, "1", True, None])
def test_other_versions_are_refused_naming_both(version: Any, copy: Path) -> None:
    line = refuse(copy, lambda content: content.update(format_version=version))
    assert f"has format_version {version!r}; this hsai reads version 1" in line


def test_manifest_without_a_version_is_refused(copy: Path) -> None:
    assert "has no format_version" in refuse(copy, lambda content: content.pop("format_version"))
    (copy / "manifest.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="has no format_version"):
        read_manifest(copy)


def test_manifest_that_is_cut_is_no_json(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(InputError, match="is not a JSON file"):
        read_manifest(copy)


@pytest.mark.parametrize("name", ["../secrets", "graphs/../../secrets", "/etc/passwd", "..\\secrets", ""])
def test_file_outside_of_the_bundle_is_refused(name: str, copy: Path) -> None:
    line = refuse(copy, lambda content: content["files"].update({name: GOOD_RECORD}))
    assert f"files: {name!r} does not lie inside the bundle" in line


def test_file_that_is_spoken_of_must_be_listed(copy: Path) -> None:
    assert "'weights.safetensors' is not listed" in refuse(copy, lambda c: c["files"].pop("weights.safetensors"))


def test_tokenizer_outside_of_the_bundle_is_refused(copy: Path) -> None:
    line = refuse(copy, lambda content: content["tokenizer"].update(file="../tokenizer.json"))
    assert "'../tokenizer.json' is not listed" in line


def test_model_that_cannot_be_is_refused(copy: Path) -> None:
    assert "model.heads=3" in refuse(copy, lambda content: content["model"].update(heads=3))


@pytest.mark.parametrize(("field", "value"), [("bytes", -1), ("bytes", "7"), ("sha256", "abc"), ("sha256", None)])
def test_file_record_that_cannot_be_is_refused(field: str, value: Any, copy: Path) -> None:
    line = refuse(copy, lambda content: content["files"]["tokenizer.json"].update({field: value}))
    assert f"files.tokenizer.json: {field}=" in line or f"files.tokenizer.json.{field}: expected" in line
