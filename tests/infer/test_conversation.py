"""Conversations over an engine that counts words: what is kept, what is forgotten, and what an interruption leaves."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from hsai.errors import InputError
from hsai.infer import SamplingConfig
from hsai.infer.conversation import Conversation, Message


class Parrot:
    """An engine with a token a word, that says back what it was told last."""

    def __init__(self, slots: int) -> None:
        self.runtime = SimpleNamespace(slots=slots)
        self.asked: list[list[Message]] = []
        self.seeds: list[int] = []

    def encode_chat(self, messages: Sequence[Message]) -> list[str]:
        return [word for message in messages for word in message["content"].split()]

    def chat(
        self, messages: list[Message], *, max_tokens: int, sampling: SamplingConfig, on_text: Callable[[str], None]
    ) -> str:
        if len(self.encode_chat(messages)) > self.runtime.slots:
            raise InputError("too long")
        self.asked.append(list(messages))
        self.seeds.append(sampling.seed)
        for word in messages[-1]["content"].split()[:max_tokens]:
            on_text(f"{word}. ")
        return "done"


def say(conversation: Conversation, message: str, **options: Any) -> Any:
    return conversation.answer(
        message, **{"max_tokens": 9, "sampling": SamplingConfig(temperature=1.0, seed=5)} | options
    )


def contents(messages: Sequence[Message]) -> list[str]:
    return [f"{message['role'][0]}:{message['content'].strip()}" for message in messages]


def test_what_was_said_is_kept() -> None:
    parrot = Parrot(100)
    conversation = Conversation(parrot, system="be")  # type: ignore[arg-type]
    shown: list[str] = []
    assert say(conversation, "a b", on_text=shown.append) == "done" and shown == ["a. ", "b. "]
    say(conversation, "c")
    assert contents(parrot.asked[1]) == ["s:be", "u:a b", "a:a. b.", "u:c"]
    assert contents(conversation.messages) == ["s:be", "u:a b", "a:a. b.", "u:c", "a:c."]
    assert parrot.seeds == [5, 6]


def test_the_oldest_is_forgotten_first_and_the_system_message_never() -> None:
    parrot = Parrot(16)
    conversation = Conversation(parrot, system="be")  # type: ignore[arg-type]
    for message in ("a a", "b b", "c c", "d d"):  # 4 words a turn; room for 12 beside an answer
        say(conversation, message)
    assert contents(parrot.asked[2]) == ["s:be", "u:a a", "a:a. a.", "u:b b", "a:b. b.", "u:c c"]
    assert contents(parrot.asked[3]) == ["s:be", "u:b b", "a:b. b.", "u:c c", "a:c. c.", "u:d d"]
    say(conversation, "e " * 11)
    assert contents(parrot.asked[4]) == ["s:be", "u:" + "e " * 10 + "e"]
    say(conversation, "f " * 15, max_tokens=1)
    with pytest.raises(InputError, match="too long"):
        say(conversation, "g " * 16)
    assert contents(conversation.messages)[-1] == "a:f."


def test_an_interrupted_answer_is_kept_as_far_as_it_came() -> None:
    conversation = Conversation(Parrot(100))  # type: ignore[arg-type]

    def interrupt(text: str) -> None:
        if text.startswith("b"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        say(conversation, "a b c", on_text=interrupt)
    assert contents(conversation.messages) == ["u:a b c", "a:a. b."]
    say(conversation, "d")
    assert contents(conversation.messages) == ["u:a b c", "a:a. b.", "u:d", "a:d."]
