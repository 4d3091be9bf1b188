"""Byte-level BPE: text to token ids and back, and how many bytes each token stands for.

Byte-level means that every text has tokens (there is no unknown token) and that a token's length in bytes is fixed, so
losses can be stated per byte and compared between vocabularies. The work is done by Hugging Face's `tokenizers`; this
wrapper pins the choices that matter and refuses what it would silently drop.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hsai.errors import InputError
from hsai.files import atomic_write

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 256 + 1
"""Every byte, and the end-of-text token."""


class Tokenizer:
    """A byte-level BPE tokenizer. Text never turns into special tokens, not even text that spells one.

    Attributes:
      vocab_size: V, number of token ids; ids are 0..V-1.
      eot: id of the token that stands before every document.
      token_bytes: int32 (V,), UTF-8 bytes each token stands for; special tokens stand for none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, end_of_text: str = END_OF_TEXT):
        """Wraps `backend`.

        Raises:
          InputError: it is no byte-level tokenizer, or has no token `end_of_text`.
        """
        eot = backend.token_to_id(end_of_text)
        if eot is None:
            raise InputError(f"the tokenizer has no token {end_of_text!r}; name its end-of-text token")
        # The flag is not stored in tokenizer.json, so it is set whenever one is loaded.
        backend.encode_special_tokens = True
        self._backend = backend
        self.eot: int = eot
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.token_bytes: np.ndarray = _count_bytes(backend, self.vocab_size)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns `vocab_size` tokens: end-of-text (id 0), the 256 bytes, and merges. The same texts give the same file.

        Raises:
          InputError: `vocab_size` is below 257, or the texts hold too few distinct pairs to fill it.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise InputError(
                f"vocab_size={vocab_size} must be at least {SMALLEST_VOCABULARY} (256 bytes and end-of-text)"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        tokenizer = cls(backend)
        if tokenizer.vocab_size != vocab_size:
            raise InputError(
                f"vocab_size={vocab_size} cannot be filled: this text yields {tokenizer.vocab_size} tokens; "
                "ask for at most that many, or give more text"
            )
        return tokenizer

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, end_of_text: str = END_OF_TEXT) -> "Tokenizer":
        """Reads a tokenizer.json.

        Raises:
          InputError: the file is missing, is no tokenizer, is not byte-level, or lacks `end_of_text`.
        """
        try:
            content = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the tokenizer {path}: {error}") from error
        try:
            backend = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # `tokenizers` raises bare Exception for every fault of the content
            raise InputError(f"{path} is not a tokenizer.json: {error}") from error
        try:
            return cls(backend, end_of_text=end_of_text)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json (Hugging Face's format), whole or not at all."""
        with atomic_write(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The content of tokenizer.json: equal tokenizers give equal text."""
        return self._backend.to_str(pretty=True) + "\n"

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no end-of-text is added.

        Raises:
          InputError: `text` holds a lone surrogate, which no UTF-8 can say.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, over all cores. Raises as `encode`."""
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InputError(
                    f"character {text[error.start]!r} at {error.start} of the text is not Unicode"
                ) from error
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens, special tokens left out; bytes that are not UTF-8 (a cut character) become U+FFFD.

        Raises:
          InputError: an id is not in 0..V-1.
        """
        ids = [int(token) for token in ids]
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise InputError(f"token id {token} is out of range; valid are 0 to {self.vocab_size - 1}")
        return self._backend.decode(ids, skip_special_tokens=True)


def _count_bytes(backend: tokenizers.Tokenizer, vocab_size: int) -> np.ndarray:
    """int32 (V,). Byte-level BPE writes each byte as one character of a fixed alphabet, so a token's length counts."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    added = backend.get_added_tokens_decoder()
    counts = np.zeros(vocab_size, np.int32)
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if not 0 <= index < vocab_size:
            raise InputError(
                f"token {token!r} has id {index}, beyond the vocabulary's {vocab_size}; ids must be 0..V-1"
            )
        if index in added:
            # Added tokens are spelled as plain text; the special ones never come from text.
            counts[index] = 0 if added[index].special else len(token.encode("utf-8"))
        elif set(token) <= alphabet:
            counts[index] = len(token)
        else:
            raise InputError(f"token {token!r} is not made of bytes; only byte-level BPE tokenizers can be used")
    return counts
