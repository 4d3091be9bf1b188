"""Names that can be fetched, and where the cache lies; the real packages are not downloaded here."""

import dataclasses
import re
from pathlib import Path

import pytest

from hsai.errors import InputError
from hsai.fetch import CATALOG, default_cache, fetch
from tests.fetch.wheelhouse import NAME, build, pin


@pytest.mark.parametrize(
    ("value", "cache"),
    [("/var/x", Path("/var/x/hsai")), ("", Path("/home/u/.cache/hsai")), ("relative", Path("/home/u/.cache/hsai"))],
)
def test_the_cache_follows_xdg(value: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert default_cache() == cache


def test_pins_are_whole() -> None:
    for name, entry in CATALOG.items():
        wheel = entry.wheel
        assert re.fullmatch(r"[\w.-]+", name)
        assert re.fullmatch("[0-9a-f]{64}", wheel.sha256) and re.fullmatch("[0-9a-f]{64}", wheel.record_sha256)
        assert wheel.file.startswith(f"{wheel.package.replace('-', '_')}-{wheel.version}-")
        assert wheel.version in entry.about and wheel.members


def test_a_name_gives_the_path_inside_the_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".smollm2-135m.partial").mkdir()
    wheel = build(tmp_path / ".smollm2-135m.partial")
    entry = CATALOG["smollm2-135m"]
    changed = dataclasses.replace(entry, wheel=pin(wheel), path="toy_data/model.gguf")
    monkeypatch.setattr("hsai.fetch.catalog.CATALOG", {"smollm2-135m": changed})
    path = fetch("smollm2-135m", cache=tmp_path)
    assert path == tmp_path / "smollm2-135m" / "toy_data" / "model.gguf" and path.is_file()
    assert NAME not in {path.name for path in tmp_path.rglob("*")}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135", "nothing is called 'smollm2-135'; did you mean smollm2-135m?"),
        ("gpt", "nothing is called 'gpt'; .*smollm2-135m, .*hf:ORG/NAME"),
        ("hf:", "'hf:' names no repository; say hf:ORG/NAME"),
        ("hf:../..", "names no repository"),
        ("hf:a/b/c", "'hf:a/b/c' names no repository"),
    ],
)
def test_names_that_cannot_be(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        fetch(name, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
