"""Directories: told beforehand when they cannot be made, and removed again when a command fails."""

import os
from pathlib import Path

import pytest

from hsai.cli.places import check_place, no_empty_directories
from hsai.errors import InputError


def test_places_that_can_be_written_to(place: Path) -> None:
    for path in (Path("new"), Path("new/below"), place, place / "new"):
        check_place(path, "--out")
    assert list(place.iterdir()) == []


def test_a_file_is_no_place(place: Path) -> None:
    Path("file").write_text("x")
    with pytest.raises(InputError, match="^--out file is a file"):
        check_place(Path("file"), "--out")
    with pytest.raises(InputError, match="^--out file/a/b cannot be made: .*/file is a file"):
        check_place(Path("file/a/b"), "--out")


def test_the_nearest_directory_that_exists_decides(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(path) or False)
    with pytest.raises(InputError, match="^--out new/below: .* may not be written to"):
        check_place(Path("new/below"), "--out")
    assert asked == [place]


def test_only_what_was_made_and_is_empty_goes(place: Path) -> None:
    Path("old").mkdir()
    with pytest.raises(KeyboardInterrupt):
        with no_empty_directories([Path("old/new/below"), Path("full/below"), Path("never")]):
            Path("old/new/below").mkdir(parents=True)
            Path("full/below").mkdir(parents=True)
            Path("full/file").write_text("x")
            raise KeyboardInterrupt
    assert sorted(path.as_posix() for path in Path().rglob("*")) == ["full", "full/file", "old"]


def test_nothing_goes_when_all_is_well(place: Path) -> None:
    with no_empty_directories([Path("new/below")]):
        Path("new/below").mkdir(parents=True)
    assert Path("new/below").is_dir()
