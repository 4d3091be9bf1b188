"""manifest.json: each way in which it can be wrong is one line that says which."""

import json
from pathlib import Path
from typing import Any

import pytest

from hsai.errors import InputError
from hsai.export.manifest import read_manifest, write_manifest
from tests.export.manifests import edit

KEYS = ("created_by", "model", "weights", "tokenizer", "graphs", "files", "extra")
GOOD_RECORD = {"bytes": 1, "sha256": "0" * 64}


def refuse(directory: Path, change: Any) -> str:
    """The line that refuses the manifest of `directory` after `change(content)`."""
    path = directory / "manifest.json"
    edit(path, change)
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


def scalars(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every number, word and truth value of a JSON tree stands."""
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return [place for key, value in items for place in scalars(value, (*path, key))]
    return [path]


def test_any_value_that_was_altered_is_noticed(copy: Path) -> None:
    """Also one that is as good a value as the one before: it would make another model of the same weights."""
    path = copy / "manifest.json"
    text = path.read_text()
    places = scalars(json.loads(text))
    assert (
        len(places) >= 40 and ("model", "norm_eps") in places and ("files", "weights.safetensors", "sha256") in places
    )
    for place in places:
        content = json.loads(text)
        holder = content
        for key in place[:-1]:
            holder = holder[key]
        old = holder[place[-1]]
        holder[place[-1]] = not old if isinstance(old, bool) else old * 2 if isinstance(old, float) else f"{old}0"
        if isinstance(old, int) and not isinstance(old, bool):
            holder[place[-1]] = old + 1
        path.write_text(json.dumps(content))
        with pytest.raises(InputError) as caught:
            read_manifest(copy)
        fault = "format_version 2" if place == ("format_version",) else "is altered"
        assert fault in str(caught.value) and "\n" not in str(caught.value), place
    path.write_text(json.dumps(json.loads(text), indent=7, sort_keys=True))  # the same content in another form
    read_manifest(copy)


def test_a_manifest_without_its_digest_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="is altered: its SHA-256 is [0-9a-f]{64}, and it says None"):
        read_manifest(copy)
