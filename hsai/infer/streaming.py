"""Text from tokens as they come: only whole characters, and in the end the same text as from all tokens at once.

A token of a byte-level vocabulary may end in the middle of a character. Decoded by itself such an end reads as U+FFFD,
so one of these at the end is held back until the next token tells what it is.
"""

from hsai.data.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """`push` each token, then `finish`; the pieces joined are the text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._emitted = 0  # characters of the pending tokens' text that have been given out

    def push(self, token: int) -> str:
        """What became certain with this token; may be empty."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        if not text.endswith(REPLACEMENT):
            piece = text[self._emitted :]
            self._pending, self._emitted = [], 0
            return piece
        # An incomplete character reads as exactly one U+FFFD, whatever number of its bytes are there.
        piece = text[self._emitted : -1]
        self._emitted = len(text) - 1
        return piece

    def finish(self) -> str:
        """What was held back: bytes that never became a character read as U+FFFD."""
        text = self._tokenizer.decode(self._pending)[self._emitted :]
        self._pending, self._emitted = [], 0
        return text
