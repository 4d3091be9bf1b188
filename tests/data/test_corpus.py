"""The corpus on disk: what it holds, that it is built once, and that damage and misuse are named."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hsai.data.corpus import Corpus, DataConfig, build_corpus
from hsai.data.corpus_files import FILES, TokenWriter, open_corpus, token_dtype
from hsai.errors import InputError
from hsai.files import sha256


def copy(corpus: Corpus, directory: Path) -> Path:
    return Path(shutil.copytree(corpus.directory, directory / "copy"))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def documents(corpus: Corpus, stream: np.ndarray) -> list[str]:
    starts = np.flatnonzero(stream == corpus.tokenizer.eot)
    return [corpus.tokenizer.decode(part) for part in np.split(stream, starts[1:])]


def test_tokens_are_the_files_split_in_two(corpus: Corpus, texts: Path):
    train, heldout = documents(corpus, corpus.train), documents(corpus, corpus.heldout)
    files = sorted(path.read_text("utf-8") for path in texts.rglob("*.txt"))
    assert sorted(train + heldout) == files
    assert train and heldout and not set(train) & set(heldout)
    assert train != sorted(train)  # not in the order of names


def test_counts_and_layout(corpus: Corpus, texts: Path):
    counts = corpus.meta["counts"]
    assert counts["train"]["tokens"] == len(corpus.train) and counts["heldout"]["tokens"] == len(corpus.heldout)
    assert counts["train"]["documents"] + counts["heldout"]["documents"] == 40
    total = sum(path.stat().st_size for path in texts.rglob("*.txt"))
    assert counts["train"]["bytes"] + counts["heldout"]["bytes"] == total
    assert corpus.train.dtype == np.dtype("<u2") and isinstance(corpus.train, np.memmap)
    assert corpus.tokenizer.token_bytes[corpus.train].sum() == counts["train"]["bytes"]
    assert sorted(path.name for path in corpus.directory.iterdir()) == sorted([*FILES, "meta.json"])
    assert {name: sha256(corpus.directory / name) for name in FILES} == {
        name: entry["sha256"] for name, entry in corpus.meta["files"].items()
    }


def test_the_second_call_reuses(corpus: Corpus, config: DataConfig):
    before = contents(corpus.directory)
    again = build_corpus(dataclasses.replace(config, sequence_length=8, prefetch=1), corpus.directory)
    assert again.reused and not corpus.reused
    assert contents(corpus.directory) == before and (again.train == corpus.train).all()


def test_the_same_config_builds_the_same_bytes(corpus: Corpus, config: DataConfig, tmp_path: Path):
    assert contents(build_corpus(config, tmp_path / "twin").directory) == contents(corpus.directory)


@pytest.mark.parametrize(
    "field, value",
    [("vocab_size", 291), ("heldout_fraction", 0.3), ("max_bytes", 10**9), ("split_seed", 1), ("tokenizer_bytes", 99)],
)
def test_another_config_is_refused(corpus: Corpus, config: DataConfig, field: str, value: int | float):
    other = dataclasses.replace(config, **{field: value})
    with pytest.raises(InputError, match=rf"data.{field}={getattr(config, field)}, not {value}; .*another directory"):
        build_corpus(other, corpus.directory)


def test_another_source_is_refused(corpus: Corpus, config: DataConfig):
    with pytest.raises(InputError, match="data.source='.*', not 'python_stdlib'; .*another directory"):
        build_corpus(dataclasses.replace(config, source="python_stdlib"), corpus.directory)


def test_each_content_field_changes_the_corpus(corpus: Corpus, config: DataConfig, tmp_path: Path):
    for field, value in [("vocab_size", 280), ("heldout_fraction", 0.5), ("max_bytes", 20000), ("split_seed", 1)]:
        other = build_corpus(dataclasses.replace(config, **{field: value}), tmp_path / field)
        assert not np.array_equal(other.train, corpus.train)
        assert other.meta["content_sha256"] != corpus.meta["content_sha256"]
    learned = build_corpus(dataclasses.replace(config, tokenizer_bytes=1500), tmp_path / "tokenizer_bytes")
    assert learned.meta["files"]["tokenizer.json"] != corpus.meta["files"]["tokenizer.json"]


@pytest.mark.parametrize("kept", [(), FILES[:1], FILES[:2], FILES])
def test_a_build_that_died_is_repeated(corpus: Corpus, config: DataConfig, tmp_path: Path, kept: tuple[str, ...]):
    directory = copy(corpus, tmp_path)
    for name in {*FILES, "meta.json"} - set(kept):
        (directory / name).unlink()
    for name in kept:
        (directory / name).write_bytes(b"half")
    assert not build_corpus(config, directory).reused
    assert contents(directory) == contents(corpus.directory)


@pytest.mark.parametrize("name", FILES)
def test_a_cut_or_missing_file_is_named(corpus: Corpus, config: DataConfig, tmp_path: Path, name: str):
    directory = copy(corpus, tmp_path)
    size = (directory / name).stat().st_size
    (directory / name).write_bytes((directory / name).read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{name} has {size - 1} bytes and should have {size}"):
        build_corpus(config, directory)
    (directory / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        open_corpus(directory)


@pytest.mark.parametrize("name", FILES)
def test_verification_finds_an_altered_file(corpus: Corpus, tmp_path: Path, name: str):
    directory = copy(corpus, tmp_path)
    open_corpus(directory, verify=True)
    content = bytearray((directory / name).read_bytes())
    content[-3] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} was altered"):
        open_corpus(directory, verify=True)


def test_a_spoiled_header_is_no_traceback(corpus: Corpus, tmp_path: Path):
    directory = copy(corpus, tmp_path)
    content = (directory / "train.tokens").read_bytes()
    (directory / "train.tokens").write_bytes(b"spoiled!" + content[8:])
    with pytest.raises(InputError, match="train.tokens was altered: it is not a .npy file"):
        open_corpus(directory)
    (directory / "train.tokens").write_bytes(content.replace(b"<u2", b"<i2", 1))
    with pytest.raises(InputError, match="it holds int16"):
        open_corpus(directory)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 99}, "version 99; this hsai reads 1"),
        ({"format": "other"}, "does not describe a corpus"),
        ({"files": {}}, "entries are missing"),
        ({"config": None}, "entries are missing"),
    ],
)
def test_meta_that_cannot_be_read(corpus: Corpus, tmp_path: Path, change: dict, message: str):
    directory = copy(corpus, tmp_path)
    meta = json.loads((directory / "meta.json").read_text())
    (directory / "meta.json").write_text(json.dumps(meta | change))
    with pytest.raises(InputError, match=message):
        open_corpus(directory)
    (directory / "meta.json").write_text("{")
    with pytest.raises(InputError, match="meta.json is not a JSON file"):
        open_corpus(directory)


def test_a_directory_without_a_corpus(tmp_path: Path):
    with pytest.raises(InputError, match="holds no corpus"):
        open_corpus(tmp_path / "none")


def test_a_directory_in_use_is_refused_and_untouched(config: DataConfig, tmp_path: Path):
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="holds 'model.safetensors' and no corpus"):
        build_corpus(config, tmp_path)
    assert contents(tmp_path) == {"tokenizer.json": b"mine", "model.safetensors": b"mine"}
    with pytest.raises(InputError, match="is a file"):
        build_corpus(config, tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="Not a directory"):
        build_corpus(config, tmp_path / "tokenizer.json" / "below")


def test_changed_text_is_noticed_and_vanished_text_is_not_needed(texts: Path, config: DataConfig, tmp_path: Path):
    source = Path(shutil.copytree(texts, tmp_path / "texts"))
    mine = dataclasses.replace(config, source=str(source))
    build_corpus(mine, tmp_path / "corpus")
    (source / "more.txt").write_text("new")
    with pytest.raises(InputError, match="files in .* changed since"):
        build_corpus(mine, tmp_path / "corpus")
    shutil.rmtree(source)
    assert build_corpus(mine, tmp_path / "corpus").reused


def test_too_little_text_leaves_nothing(config: DataConfig, corpus: Corpus, tmp_path: Path):
    longest = len(corpus.train) - 1
    long = dataclasses.replace(config, sequence_length=longest + 1)
    with pytest.raises(InputError, match=f"sequence_length={longest + 1} does not fit: .* at most {longest} is valid"):
        build_corpus(long, tmp_path / "corpus")
    assert contents(tmp_path / "corpus") == {}
    with pytest.raises(InputError, match=f"at most {longest} is valid"):
        build_corpus(long, corpus.directory)
    build_corpus(dataclasses.replace(config, sequence_length=longest), tmp_path / "corpus")


def test_a_vocabulary_that_the_text_cannot_fill_leaves_nothing(config: DataConfig, tmp_path: Path):
    with pytest.raises(InputError, match="vocab_size=60000 cannot be filled"):
        build_corpus(dataclasses.replace(config, vocab_size=60000), tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_copies_never_cross_the_split_and_bad_files_are_reported(texts: Path, config: DataConfig, tmp_path: Path):
    source = Path(shutil.copytree(texts, tmp_path / "texts"))
    for path in list(source.rglob("*.txt")):
        shutil.copy(path, path.with_name("copy-" + path.name))
    (source / "latin.txt").write_bytes(b"caf\xe9")
    built = build_corpus(dataclasses.replace(config, source=str(source)), tmp_path / "corpus")
    assert len(built.meta["skipped"]["duplicate"]) == 40
    assert built.meta["skipped"]["undecodable"] == ["latin.txt"]
    assert not set(documents(built, built.train)) & set(documents(built, built.heldout))


def test_a_source_without_text_is_refused(config: DataConfig, tmp_path: Path):
    source = tmp_path / "texts"
    source.mkdir()
    for index in range(3):
        (source / f"{index}").write_bytes(b"\xff\xfe" * (index + 1))
    with pytest.raises(InputError, match="no file of data.source is UTF-8 text, . among them"):
        build_corpus(dataclasses.replace(config, source=str(source)), tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_a_split_without_any_text_is_refused(config: DataConfig, tmp_path: Path):
    source = tmp_path / "texts"
    source.mkdir()
    for index in range(30):
        (source / f"{index}").write_text("the same in each file")
    with pytest.raises(InputError, match="no heldout file holds UTF-8 text of its own"):
        build_corpus(dataclasses.replace(config, source=str(source), vocab_size=260), tmp_path / "corpus")


def test_progress_goes_up_to_its_total(config: DataConfig, tmp_path: Path):
    calls: list[tuple[str, int, int]] = []
    build_corpus(config, tmp_path / "corpus", lambda *call: calls.append(call))
    for step in ("learning the vocabulary", "tokenizing text"):
        done = [call[1] for call in calls if call[0] == step]
        assert done == sorted(done) and done[-1] == next(call[2] for call in calls if call[0] == step)


def test_the_standard_library_is_a_corpus(tmp_path: Path):
    config = DataConfig(vocab_size=512, max_bytes=1_000_000, heldout_fraction=0.1, sequence_length=128)
    built = build_corpus(config, tmp_path / "corpus")
    total = sum(built.meta["counts"][split]["bytes"] for split in ("train", "heldout"))
    assert 500_000 < total <= 1_000_000
    assert built.tokenizer.vocab_size == 512
    assert "standard library" in built.meta["source"]["description"]


@pytest.mark.parametrize(
    "fields",
    [
        {"source": ""},
        {"vocab_size": 256},
        {"heldout_fraction": 0.0},
        {"heldout_fraction": 1.0},
        {"heldout_fraction": float("nan")},
        {"max_bytes": 0},
        {"tokenizer_bytes": 0},
        {"sequence_length": 0},
        {"prefetch": 0},
    ],
)
def test_configs_that_cannot_be(fields: dict):
    (name,) = fields
    with pytest.raises(InputError, match=f"data.{name}"):
        DataConfig(**fields)


@pytest.mark.parametrize("count", [0, 1, 9, 10, 100_000])
def test_token_files_of_any_length(tmp_path: Path, count: int):
    dtype = token_dtype(70_000)
    with TokenWriter(tmp_path / "t", dtype) as writer:
        for start in range(0, count, 999):
            writer.append(range(start, min(start + 999, count)))
    assert writer.count == count
    assert (np.load(tmp_path / "t") == np.arange(count)).all() and np.load(tmp_path / "t").dtype == np.uint32


def test_the_smallest_type_that_holds_the_vocabulary():
    assert [token_dtype(size).str for size in (300, 65536, 65537)] == ["<u2", "<u2", "<u4"]
