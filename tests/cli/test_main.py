"""Words before any work is done: commands, help, options; and what the operating system refuses."""

import errno
import re
from pathlib import Path

import pytest

import hsai.cli
from hsai.cli import COMMANDS, main
from tests.cli.conftest import TINY


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_overview_names_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for name, text in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", printed.out, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main([name, "--help"]) == 0
    except SystemExit as end:  # argparse ends by itself
        assert end.code == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"usage: hsai {name}" in printed.out
    assert f"\nhsai {name} " in printed.out or f" hsai {name} " in printed.out, "no example"
    body = printed.out.split("positional arguments:")[1]
    rows = re.split(r"\n(?=  \S)", body.replace("\noptions:", ""))[1:]
    assert rows and all(re.search(r"(  |\n {4,})\S", row.strip()) for row in rows), "an argument without help"


def test_help_of_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", TINY, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for name in ("--directory", "--data-directory", "--optim.learning-rate FLOAT", "--mesh.model INT"):
        assert name in printed
    assert "(default: 0.003)" in printed  # of this config, not of its type


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["trian"], ("'trian'", "did you mean train?")),
        (["frobnicate"], ("'frobnicate'", *COMMANDS)),
        (["--version"], ("'--version'", *COMMANDS)),
        (["train"], ("CONFIG", "hsai train --help")),
        (["train", "--train.steps", "3", TINY], ("--train.steps", "hsai train CONFIG")),
        (["train", TINY, "--train.stepps", "3"], ("--train.stepps", "did you mean --train.steps?")),
        (["train", TINY, "--data-dir", "x"], ("--data-dir", "did you mean --data-directory?")),
        (["train", TINY, "extra"], ("'extra'",)),
        (["train", TINY, "--directory"], ("--directory", "expected one argument")),
        (["compress"], ("model", "--recipe", "--out")),
        (["compress", "x", "--recipe", "y", "--ouput", "z"], ("--ouput", "did you mean --out?")),
        (["compress", "x", "--recipe", "--out", "z"], ("--recipe",)),
        (["export", "x"], ("--out",)),
        (["export", "x", "--out", "y", "--prefill-buckets", "many"], ("--prefill-buckets", "'many'", "int")),
        (["export", "x", "--out", "y", "--prefil-buckets=8"], ("did you mean --prefill-buckets?",)),
        (["eval"], ("model",)),
        (["eval", "x", "--tokens", "0"], ("--tokens 0", "at least 1")),
        (["eval", "x", "--tokens", "1.5"], ("--tokens", "'1.5'", "int")),
        (["generate", "x"], ("prompt",)),
        (["generate", "x", "y", "z"], ("z",)),
        (["generate", "x", "y", "--temprature", "1"], ("did you mean --temperature?",)),
        (["generate", "x", "y", "--temperature", "hot"], ("--temperature", "'hot'", "float")),
    ],
)
def test_words_that_cannot_be(words: list[str], names: tuple[str, ...], refuse) -> None:
    refuse(*words, names=names)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "error: a/b: No space left on device; free some"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "error: a/b: Permission denied; give a path"),
        (OSError(errno.EIO, "Input/output error"), "error: Input/output error\n"),
        (
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "error: No space left on device; free some",
        ),
        (
            ValueError("RESOURCE_EXHAUSTED: Failed writing: \"a/b\": Failed to write [os_error_code='28']"),
            "error: a/b: No space left on device; free some",
        ),
        (OSError("5 requested\nand 3 written"), "error: 5 requested and 3 written\n"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: list[str]) -> None:
        raise error

    monkeypatch.setattr(hsai.cli, "_dispatch", fail)
    assert main(["eval"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(line) and printed.count("\n") == 1


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: list[str]) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(hsai.cli, "_dispatch", fail)
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["eval"])


@pytest.mark.parametrize("command", ["train", "eval"])
def test_an_interrupt_is_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(words: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hsai.cli, "_dispatch", interrupt)
    assert main([command]) == 130
    resumable = "; the same command goes on from the last checkpoint" if command == "train" else ""
    assert capsys.readouterr().err == f"interrupted{resumable}\n"


def test_a_prompt_may_look_like_an_option(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--", "-x"], ["-- comment"], ["-3"]):
        assert main(["generate", "nowhere", *words]) == 2
        assert "nowhere" in capsys.readouterr().err
