"""`hsai chat`: lines in, answers out, one conversation; what Ctrl-C ends, and what it does not."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hsai.cli import chat, main
from hsai.errors import InputError
from hsai.infer import Engine
from hsai.infer.conversation import Conversation
from hsai.infer.sampling import SamplingConfig
from tests.cli.conftest import Workshop

Refuse = Callable[..., str]


class Terminal(io.StringIO):
    """What somebody types; a line "^C" is the key."""

    def isatty(self) -> bool:
        return True

    def readline(self, *sizes: Any) -> str:
        line = super().readline(*sizes)
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


def test_lines_are_answered_as_one_conversation(
    talking: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing but the answers is printed; what stands behind /quit is not read."""
    monkeypatch.setattr("sys.stdin", io.StringIO("x = 1\n\ny = 2\n/quit\nz = 3\n"))
    words = ["chat", str(talking), "--system", "Be brief.", "--max-tokens", "6", "--temperature", "0"]
    assert main(words) == 0
    conversation = Conversation(Engine.load(talking), system="Be brief.")
    wanted = [
        conversation.answer(line, max_tokens=6, sampling=SamplingConfig()).text + "\n" for line in ("x = 1", "y = 2")
    ]
    assert capsys.readouterr().out == "".join(wanted)


class Answers:
    """In the place of a conversation: what comes of the messages, one after the other."""

    def __init__(self, *outcomes: BaseException | None) -> None:
        self.outcomes = list(outcomes)
        self.messages: list[str] = []

    def answer(self, message: str, *, on_text: Callable[[str], None], **options: Any) -> Any:
        self.messages.append(message)
        on_text("An ans")
        if (outcome := self.outcomes.pop(0)) is not None:
            raise outcome
        on_text("wer.")
        return "it"


@pytest.fixture
def talk(talking: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Answers], int]:
    def run(typed: str, answers: Answers) -> int:
        monkeypatch.setattr("sys.stdin", Terminal(typed))
        monkeypatch.setattr(chat, "Conversation", lambda *arguments, **options: answers)
        monkeypatch.setattr(chat, "describe_answer", lambda done: f"[{done} took long]")
        return main(["chat", str(talking)])

    return run


def test_at_a_terminal_nothing_but_the_user_ends_it(
    talk: Callable[[str, Answers], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends the answer, or begins the line anew; a message that cannot be answered is told."""
    answers = Answers(
        None, KeyboardInterrupt(), InputError("the prompt is too long"), RuntimeError("the engine failed"), None
    )
    assert talk("one\ntwo\n^C\nthree\nfour\nfive\n", answers) == 0
    printed = capsys.readouterr()
    assert answers.messages == ["one", "two", "three", "four", "five"]
    assert printed.out == "> An answer.\n> An ans\n> > An ans> An ans\n> An answer.\n> \n"
    assert "[it took long]" in printed.err and "error: the prompt is too long\n" in printed.err
    assert "error: the engine failed\n" in printed.err
    assert "/quit or Ctrl-D ends the conversation" in printed.err


def test_without_a_terminal_everything_ends_it(
    talking: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for outcome, status in ((KeyboardInterrupt(), 130), (InputError("the prompt is too long"), 2)):
        monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
        answers = Answers(outcome, None)
        monkeypatch.setattr(chat, "Conversation", lambda *arguments, answers=answers, **options: answers)
        assert main(["chat", str(talking)]) == status
        assert answers.messages == ["one"]


def test_lines_that_are_no_text_are_refused(
    talking: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where Python's own input is strict about it."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors="strict"))
    assert main(["chat", str(talking)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.endswith("error: character '\\udce9' at 3 of the text is not Unicode\n")


def test_chats_that_cannot_be(workshop: Workshop, talking: Path, refuse: Refuse) -> None:
    bundle = workshop.bundles / "int8"
    refuse("chat", bundle, names=("no chat template", "chat_template.jinja"))
    refuse("chat", talking, "--max-tokens", "0", names=("--max-tokens 0", "at least 1"))
    refuse("chat", talking, "--top-p", "3", names=("top_p=3.0",))
    refuse("chat", "nowhere", names=("nowhere does not exist",))
