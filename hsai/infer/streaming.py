"""Text from tokens as they come: only whole characters, nothing of a stop string, and in the end the whole text.

A token may end in the middle of a character, or of what may become a stop string. That is held back until the next
tokens tell what it is.
"""

import codecs
from collections.abc import Sequence

from hsai.data.tokenizer import Tokenizer


class TextStream:
    """`push` each token, then `finish`; the pieces joined are the text.

    The tokens continue a text: a space that the first one begins with is the model's, and is given out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """What became certain with this token; may be empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """What was held back: bytes that never became a character read as U+FFFD."""
        return self._decoder.decode(b"", final=True)


class StopFinder:
    """Cuts a text before the first stop string that it comes to hold; `push` pieces until it is `found`."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What is certain not to belong to a stop string; once one is found, what stands before it."""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        held = min(len(self._held), self._longest - 1)
        while held > 0 and not any(stop.startswith(self._held[-held:]) for stop in self._stops):
            held -= 1
        certain = len(self._held) - max(held, 0)
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def finish(self) -> str:
        """What was held back, if no stop string was found."""
        return "" if self.found else self._held
