"""`hsai train`: what it makes, and what it refuses before anything is made."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hsai.cli import main
from hsai.config import RunConfig
from hsai.configuration import from_dict
from tests.cli.conftest import SHORT, TINY, Workshop

Refuse = Callable[..., str]


def test_a_run_has_all_its_parts(workshop: Workshop) -> None:
    names = {path.name for path in workshop.run.iterdir()}
    assert {"checkpoints", "config.json", "loss.png", "metrics.jsonl", "result.json", "tokenizer.json"} <= names
    result = json.loads((workshop.run / "result.json").read_text())
    assert result["step"] == 6 and 0 < result["heldout_bits_per_byte"] < 10
    config = from_dict(RunConfig, json.loads((workshop.run / "config.json").read_text()))
    assert config.train.steps == 6 and config.data.max_bytes == 200_000
    assert "train.steps: 20 -> 6" in workshop.said


def test_a_second_time_there_is_nothing_to_do(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    before = (workshop.run / "result.json").stat().st_mtime_ns
    where = ("--directory", str(workshop.run), "--data-directory", str(workshop.corpus))
    assert main(["train", TINY, *SHORT, *where]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (workshop.run / "result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (None, ("experiment.py", "experimant.py")),
        ("def get_config(:", ("experiment.py line 1", "SyntaxError")),
        ("\nraise RuntimeError('out of\\ncheese')", ("experiment.py line 2", "RuntimeError: out of cheese")),
        ("import nowhere_at_all", ("experiment.py line 1", "nowhere_at_all")),
        ("x = 1", ("experiment.py", "get_config()")),
        ("def get_config():\n    return 3", ("RunConfig", "int")),
    ],
)
def test_config_files_that_cannot_be(text: str | None, names: tuple[str, ...], place: Path, refuse: Refuse) -> None:
    (place / ("experimant.py" if text is None else "experiment.py")).write_text(text or "x = 1")
    refuse("train", "experiment.py", names=names)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--model.head-dim 33", ("head_dim=33", "even")),
        ("--model.heads 3 --model.kv-heads 2", ("heads=3", "kv_heads=2")),
        ("--model.vocab 256", ("model.vocab=256", "data.vocab_size=512")),
        ("--model.max-length 32", ("data.sequence_length=64", "model.max_length=32")),
        ("--train.steps 0", ("train.steps=0", "at least 1")),
        ("--train.steps many", ("--train.steps", "int", "'many'")),
        ("--train.steps 2.5", ("--train.steps", "int", "'2.5'")),
        ("--train.steps", ("--train.steps", "int", "nothing")),
        ("--optim.warmup-steps 20", ("optim.warmup_steps=20", "train.steps=20")),
        ("--optim.schedule steep", ("--optim.schedule", "'steep'", "'cosine'")),
        ("--train.formats.0.decay 1", ("--train.formats.0.decay", "train.formats")),
        ("--mesh.model 3", ("mesh.data", "8 devices", "3")),
        ("--mesh.data 1 --mesh.model 8", ("mesh.model=8", "model.heads=2", "1, 2")),
        ("--mesh.cpu-devices 100000", ("mesh.cpu_devices=100000", "1024")),
        ("--mesh.data -1 --mesh.fsdp -1", ("mesh.data", "mesh.fsdp", "-1")),
        ("--train.batch-size 12", ("train.batch_size=12", "8")),
        ("--train.accumulate 2", ("train.batch_size=8", "train.accumulate=2")),
        ("--train.seed -1", ("train.seed=-1", "4294967295")),
        ("--train.seed 4294967296", ("train.seed=4294967296", "4294967295")),
        ("--train.accumulate 3", ("train.batch_size=8", "train.accumulate=3")),
        ("--data.source nowhere", ("data.source 'nowhere'", "python_stdlib")),
        ("--data.source file.txt", ("data.source", "at least 2 files")),
        ("--data.source little", ("vocab_size=512", "tokens")),
        ("--data.source little --data.vocab-size 257 --data.sequence-length 64", ("data.sequence_length=64",)),
        ("--data.heldout-fraction 1", ("data.heldout_fraction=1.0", "between 0 and 1")),
        ("--checkpoint.every 0", ("checkpoint.every=0", "at least 1")),
        ("--directory file.txt", ("file.txt", "is a file")),
        ("--directory file.txt/run", ("--directory", "file.txt is a file")),
        ("--data-directory file.txt/run", ("--data-directory", "file.txt is a file")),
        ("--directory both --data-directory both", ("--data-directory", "both")),
    ],
)
def test_configs_that_cannot_be(words: str, names: tuple[str, ...], place: Path, refuse: Refuse) -> None:
    (place / "file.txt").write_text("a file of text\n")
    (place / "little").mkdir()
    for name in "ab":
        (place / "little" / name).write_text(f"little {name}\n")
    refuse("train", TINY, *words.split(), names=names)


def test_a_bundle_or_a_corpus_is_no_run(workshop: Workshop, refuse: Refuse) -> None:
    bundle = workshop.bundles / "int4"
    refuse("train", TINY, "--directory", bundle, names=(str(bundle), "a bundle"), beside=(bundle,))
    refuse("train", TINY, "--directory", workshop.corpus, names=("a corpus",), beside=(workshop.corpus,))


def test_a_strangers_directory_is_no_run(place: Path, refuse: Refuse) -> None:
    (place / "hf").mkdir()
    (place / "hf" / "tokenizer.json").write_text("precious")
    refuse(
        "train", TINY, "--directory", "hf", names=("hf", "a tokenizer.json that no run made"), beside=(place / "hf",)
    )


def test_a_run_of_another_config_is_kept(workshop: Workshop, refuse: Refuse) -> None:
    words = (*SHORT, "--directory", workshop.run, "--data-directory", workshop.corpus)
    other = ("--optim.learning-rate", "0.5")
    beside = (workshop.run, workshop.corpus)
    refuse("train", TINY, *words, *other, names=("optim.learning_rate: 0.003 -> 0.5",), beside=beside)


def test_a_run_of_another_text_is_refused_before_that_text_is_read(workshop: Workshop, refuse: Refuse) -> None:
    other = ("--data.vocab-size", "300")  # another corpus, which is not there and is not built
    refuse("train", TINY, *SHORT, *other, "--directory", workshop.run, names=("data.vocab_size: 512 -> 300",))


def test_a_model_beyond_this_machine_is_one_line(
    workshop: Workshop, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*SHORT, "--data-directory", str(workshop.corpus), "--model.embed", "100000000000")
    assert main(["train", TINY, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Out of memory allocating") and error.count("\n") == 1


def test_a_corpus_of_other_settings_is_kept(workshop: Workshop, refuse: Refuse) -> None:
    words = ("--data-directory", workshop.corpus, "--data.max-bytes", "100000")
    refuse("train", TINY, *words, names=("data.max_bytes=200000", "100000"), beside=(workshop.corpus,))


@pytest.mark.parametrize("damage", ["altered", "cut", "missing", "no JSON"])
def test_a_damaged_corpus_is_refused(damage: str, workshop: Workshop, place: Path, refuse: Refuse) -> None:
    shutil.copytree(workshop.corpus, place / "corpus")
    tokens = place / "corpus" / "train.tokens"
    if damage == "altered":
        content = bytearray(tokens.read_bytes())
        content[-100] ^= 1
        tokens.write_bytes(content)
    elif damage == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-100])
    elif damage == "missing":
        tokens.unlink()
    else:
        (place / "corpus" / "meta.json").write_text("{")
    name = "meta.json" if damage == "no JSON" else "train.tokens"
    refuse("train", TINY, *SHORT, "--data-directory", "corpus", names=(f"corpus/{name}",))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing(
    function: str, monkeypatch: pytest.MonkeyPatch, place: Path, refuse: Refuse
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, fail)
    refuse("train", TINY, *SHORT, names=("No space left on device",))
