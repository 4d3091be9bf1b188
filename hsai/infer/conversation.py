"""A conversation with a model: what was said is kept, as much of it as the context holds."""

import dataclasses
from collections.abc import Callable
from typing import Any

from hsai.infer.engine import Engine, Generation
from hsai.infer.sampling import SamplingConfig

Message = dict[str, str]


class Conversation:
    """Messages with the answers that a model gave to them."""

    def __init__(self, engine: Engine, *, system: str | None = None) -> None:
        """Nothing was said yet.

        Args:
          engine: of a model with a chat template.
          system: the message that stands before all, and is never forgotten.
        """
        self.engine = engine
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._head = len(self.messages)
        self._turns = 0

    def answer(
        self, message: str, *, max_tokens: int, sampling: SamplingConfig, on_text: Callable[[str], None] | None = None
    ) -> Generation:
        """Answers a message.

        What was said longest ago is forgotten, a message with its answer, until there is room for the answer: for
        `max_tokens`, or a quarter of the context if that is less. An answer that is interrupted by an exception is kept
        as far as it came; a message that cannot be answered is not.

        Args:
          message: what the user says.
          max_tokens, on_text: as of `Engine.chat`.
          sampling: likewise; each answer draws by a seed of its own that follows from it.
        Raises:
          InputError: what `Engine.chat` refuses.
        """
        messages = self._fit([*self.messages, {"role": "user", "content": message}], max_tokens)
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

        options: dict[str, Any] = {"max_tokens": max_tokens, "sampling": _turn_seed(sampling, self._turns)}
        self._turns += 1
        try:
            return self.engine.chat(messages, **options, on_text=show)
        finally:
            if pieces:
                self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _fit(self, messages: list[Message], max_tokens: int) -> list[Message]:
        """The messages without the oldest ones that the context has no room for."""
        slots = self.engine.runtime.slots
        room = slots - min(max_tokens, slots // 4)
        while len(self.engine.encode_chat(messages)) > room and len(messages) > self._head + 1:
            messages = [*messages[: self._head], *messages[self._head + 2 :]]
        return messages


def _turn_seed(sampling: SamplingConfig, turn: int) -> SamplingConfig:
    """Other draws in each turn."""
    return dataclasses.replace(sampling, seed=(sampling.seed + turn) % 2**32)
