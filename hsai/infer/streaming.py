"""Text from tokens as they come: only whole characters, and in the end the same text as from all tokens at once.

A token may end in the middle of a character. Its bytes are held back until the next token tells what it is.
"""

import codecs

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
