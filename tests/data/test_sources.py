"""Sources: which files are found, taken, held out and read."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsai.data.sources import (
    Skipped,
    SourceFile,
    choose_files,
    find_source,
    list_python_stdlib,
    list_text_files,
    read_documents,
    split_files,
)
from hsai.errors import InputError


def make_files(count: int, size: int = 10) -> list[SourceFile]:
    return [SourceFile(name=f"f{i}.txt", path=Path(f"f{i}.txt"), size=size) for i in range(count)]


def names(files: tuple[SourceFile, ...]) -> list[str]:
    return [file.name for file in files]


def test_stdlib_is_python_files_without_installed_packages():
    source = find_source("python_stdlib")
    found = names(source.files)
    assert found == sorted(found)
    assert {"os.py", "json/decoder.py"} <= set(found)
    assert all(name.endswith(".py") and "site-packages" not in name for name in found)
    assert all(file.size == file.path.stat().st_size for file in source.files[:20])
    assert source.fingerprint == list_python_stdlib().fingerprint


def test_directory_glob_and_file(texts: Path):
    everything = list_text_files(str(texts))
    assert len(everything.files) == 40 and everything.files[0].name == "part0/text000.txt"
    part = list_text_files(str(texts / "part1" / "*.txt"))
    assert len(part.files) == 13 and part.files[0].name == "text001.txt"
    assert names(list_text_files(str(texts / "**" / "*.txt")).files) == names(everything.files)
    assert names(list_text_files(str(texts / "part*" / "text000.txt")).files) == ["part0/text000.txt"]
    assert names(list_text_files(str(texts / "part0" / "text003.txt")).files) == ["text003.txt"]


def test_hidden_files_are_left_out(tmp_path: Path):
    (tmp_path / ".git").mkdir()
    for name in (".git/config", ".hidden", "seen"):
        (tmp_path / name).write_text("x")
    assert names(list_text_files(str(tmp_path)).files) == ["seen"]


@pytest.mark.parametrize("missing", ["nowhere", "nowhere/*.txt"])
def test_missing_source_is_named(tmp_path: Path, missing: str):
    with pytest.raises(InputError, match="nowhere"):
        find_source(str(tmp_path / missing))


def test_empty_directory_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="holds no files"):
        find_source(str(tmp_path))


def test_fingerprint_sees_a_renamed_and_a_resized_file(tmp_path: Path):
    (tmp_path / "a").write_text("text")
    prints = [list_text_files(str(tmp_path)).fingerprint]
    (tmp_path / "a").write_text("texts")
    prints.append(list_text_files(str(tmp_path)).fingerprint)
    os.rename(tmp_path / "a", tmp_path / "b")
    prints.append(list_text_files(str(tmp_path)).fingerprint)
    assert len(set(prints)) == 3


sizes = st.lists(st.integers(1, 100), min_size=1, max_size=60)


def sized(values: list[int]) -> list[SourceFile]:
    return [SourceFile(name=f"f{i}.txt", path=Path(f"f{i}.txt"), size=size) for i, size in enumerate(values)]


def total(files: tuple[SourceFile, ...]) -> int:
    return sum(file.size for file in files)


@given(values=sizes, cap=st.integers(100, 4000), seed=st.integers())
def test_a_cap_is_nearly_filled_and_never_passed(values: list[int], cap: int, seed: int):
    files = sized(values)
    everything = choose_files(files, None, seed)
    assert sorted(names(everything)) == sorted(names(tuple(files)))
    capped = choose_files(reversed(files), cap, seed)
    assert total(capped) <= cap and [file for file in everything if file in capped] == list(capped)
    assert total(capped) >= min(0.9 * cap, cap - 100) or set(capped) == set(files)


def test_a_cap_is_a_sample_not_the_first_names():
    chosen = {int(name[1:-4]) for name in names(choose_files(make_files(1000), 2000, 0))}
    assert len(chosen) == 180
    assert 350 < sum(chosen) / 180 < 650  # the mean of the first 200 names would be below 100
    assert choose_files(make_files(1000), 2000, 1) != choose_files(make_files(1000), 2000, 0)


def test_one_large_file_does_not_end_the_sample():
    huge = SourceFile(name="huge", path=Path("huge"), size=1000)
    for seed in range(20):
        assert sorted(names(choose_files([huge, *make_files(5)], 50, seed))) == names(tuple(make_files(5)))


def test_empty_files_are_no_text():
    empty = SourceFile(name="empty", path=Path("empty"), size=0)
    for cap in (None, 100):
        assert names(choose_files([empty, *make_files(3)], cap, 0)) == names(choose_files(make_files(3), cap, 0))
        with pytest.raises(InputError, match="holds only empty files"):
            choose_files([empty], cap, 0)


def test_a_cap_below_every_file_is_refused():
    with pytest.raises(InputError, match="max_bytes=9 .* 10 bytes"):
        choose_files(make_files(3), 9, 0)


@given(values=sizes.filter(lambda values: len(values) > 1), fraction=st.floats(0.0001, 0.9999), seed=st.integers())
def test_split_is_a_partition_in_bytes(values: list[int], fraction: float, seed: int):
    files = sized(values)
    train, heldout = split_files(files, fraction, seed)
    assert train and heldout
    for side, other in ((train, heldout), (heldout, train)):
        assert list(side) == [file for file in files if file not in other]
    budget = int(fraction * sum(values))
    if budget >= min(values):
        assert total(heldout) <= budget
        assert total(heldout) >= min(0.9 * budget, budget - max(values))
    else:
        assert len(heldout) == 1 and heldout[0].size == min(values)


def test_more_files_move_few_across_the_split():
    _, before = split_files(make_files(2000), 0.1, 0)
    _, after = split_files(make_files(2200), 0.1, 0)
    stayed = len(set(names(before)) & set(names(after)))
    assert stayed > 0.85 * len(before)  # another draw would keep a tenth
    assert set(names(split_files(make_files(2000), 0.1, 1)[1])) != set(names(before))


@pytest.mark.parametrize("count", [0, 1])
def test_one_file_cannot_be_split(count: int):
    with pytest.raises(InputError, match=f"{count} was taken; give at least 2"):
        split_files(make_files(count), 0.5, 0)


def test_reading_reports_what_it_leaves_out(tmp_path: Path):
    contents = {"a": b"caf\xc3\xa9", "b": b"caf\xe9", "c": b"", "d": b"caf\xc3\xa9", "e": b"tea"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    skipped = Skipped()
    documents = list(read_documents(list_text_files(str(tmp_path)).files, skipped, set()))
    assert [(d.name, d.text, d.size) for d in documents] == [("a", "café", 5), ("e", "tea", 3)]
    assert (skipped.undecodable, skipped.empty, skipped.duplicate) == (["b"], ["c"], ["d"])


def test_a_file_that_went_away_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="f0.txt: No such file"):
        list(read_documents([SourceFile(name="f0.txt", path=tmp_path / "f0.txt", size=1)], Skipped(), set()))
