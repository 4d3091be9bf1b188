"""BPE that covers every text: text to token ids and back, and how many bytes each token stands for.

Every text has tokens (there is no unknown token) and a token's length in bytes is fixed, so losses can be stated per
byte and compared between vocabularies. The work is done by Hugging Face's `tokenizers`; this wrapper pins the choices
that matter and refuses what it would silently drop.
"""

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hsai.data.assets import GENERATION_CONFIG, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, parse_object
from hsai.data.pieces import list_pieces
from hsai.data.token_roles import find_roles
from hsai.errors import InputError
from hsai.files import atomic_write

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 256 + 1
"""Every byte, and the end-of-text token."""


class Tokenizer:
    """A BPE tokenizer that covers every text. Unless asked, text never turns into special tokens, not if it spells one.

    The bytes of a text's tokens add up to those of the text in UTF-8, composed (NFC) if the tokenizer does that, and
    one more where `adds_space` is true: then the tokenizer puts a space before the text, and `decode` takes it away.
    (Where it is put before any text, and where not before one that begins with a space, is the tokenizer's own rule.)

    Attributes:
      vocab_size: V, number of token ids; ids are 0..V-1.
      eot: id of the token that ends a document, and in corpora stands before every one.
      prefix: ids that stand before a text that the model is to continue: `eot`, or another, or none.
      stops: ids that end an answer, `eot` among them.
      token_bytes: int32 (V,), UTF-8 bytes each token stands for; special tokens stand for none.
      adds_space: whether tokens of a text begin with a space that the text does not have.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        end_of_text: str = END_OF_TEXT,
        prefix: Sequence[str] | None = None,
        stops: Sequence[str] = (),
    ):
        """Wraps `backend`.

        Args:
          backend: byte-level BPE, or BPE with byte fallback.
          end_of_text: the token that ends a document.
          prefix: tokens that stand before a text; by default `end_of_text`.
          stops: tokens that end an answer, besides `end_of_text`.
        Raises:
          InputError: it does not cover every text, or lacks one of the tokens.
        """
        prefix = (end_of_text,) if prefix is None else prefix
        ids: dict[str, int] = {}
        for token in (end_of_text, *prefix, *stops):
            index = backend.token_to_id(token)
            if index is None:
                role = "end-of-text" if token == end_of_text else "prefix or stop"
                raise InputError(f"the tokenizer has no token {token!r}; name its {role} token")
            ids[token] = index
        # The flag is not stored in tokenizer.json, so it is set whenever one is loaded.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._pieces = list_pieces(backend)
        self.eot: int = ids[end_of_text]
        self.prefix: tuple[int, ...] = tuple(ids[token] for token in prefix)
        self.stops: frozenset[int] = frozenset({self.eot, *(ids[token] for token in stops)})
        self.vocab_size: int = len(self._pieces)
        self.token_bytes: np.ndarray = np.fromiter(map(len, self._pieces), np.int32, len(self._pieces))
        self.adds_space: bool = self.decode_bytes(self.encode("a")).startswith(b" ")

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
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        end_of_text: str = END_OF_TEXT,
        prefix: Sequence[str] | None = None,
        stops: Sequence[str] = (),
    ) -> "Tokenizer":
        """Reads a tokenizer.json; the tokens are those of the constructor.

        Raises:
          InputError: the file is missing, is no tokenizer, does not cover every text, or lacks one of the tokens.
        """
        backend = _parse(_read_text(path), path)
        try:
            return cls(backend, end_of_text=end_of_text, prefix=prefix, stops=stops)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_huggingface(cls, directory: str | os.PathLike[str], *, vocab: int | None = None) -> "Tokenizer":
        """Reads the tokenizer of a Hugging Face repository, with what its other files say of it.

        Args:
          directory: with tokenizer.json, and tokenizer_config.json, special_tokens_map.json, generation_config.json and
            config.json as far as they are there.
          vocab: rows of the model's embedding. Special tokens that were added beyond them (Gemma 3's
            <image_soft_token>) are left out: no text turns into them, and the model has nothing for them.
        Raises:
          InputError: as `load`; no file names an end-of-text token; a file is no JSON object.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        text = _read_text(path)
        backend = _parse(text, path)
        if vocab is not None and backend.get_vocab_size(with_added_tokens=True) > vocab:
            backend = _parse(_drop_added(text, vocab), path)
        names = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, GENERATION_CONFIG, "config.json")
        files = {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}
        try:
            roles = find_roles(backend, *(parse_object(files, name) for name in names))
            return cls(backend, end_of_text=roles.end_of_text, prefix=roles.prefix, stops=roles.stops)
        except InputError as error:
            raise InputError(f"{directory}: {error}") from error

    @classmethod
    def reload(cls, path: str | os.PathLike[str], roles: Any) -> "Tokenizer":
        """Reads what `save` wrote; `roles` are those of the tokenizer that was saved, as JSON gave them back.

        Raises:
          InputError: as `load`; or `roles` are none.
        """
        if not isinstance(roles, dict) or not roles.keys() <= {"end_of_text", "prefix", "stops"}:
            raise InputError(f"what is said of the tokenizer {path} was altered")
        return cls.load(path, **roles)

    def equals(self, other: "Tokenizer") -> bool:
        """Whether both cut every text alike, and have the same tokens for the same roles."""
        return self.cuts_like(other) and self.roles == other.roles

    def cuts_like(self, other: "Tokenizer") -> bool:
        """Whether both cut every text alike.

        What tokenizer.json says of the tokens around a text is left out: the roles say it.
        """
        ours, theirs = (json.loads(tokenizer.to_json()) | {"post_processor": None} for tokenizer in (self, other))
        return bool(ours == theirs)

    @property
    def roles(self) -> dict[str, Any]:
        """Which tokens end a document, stand before a text and end an answer, by name: what no tokenizer.json says."""
        return {
            "end_of_text": self.name(self.eot),
            "prefix": [self.name(token) for token in self.prefix],
            "stops": [self.name(token) for token in sorted(self.stops - {self.eot})],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json (Hugging Face's format), whole or not at all."""
        with atomic_write(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The content of tokenizer.json: equal tokenizers give equal text."""
        return self._backend.to_str(pretty=True) + "\n"

    def name(self, token: int) -> str:
        """How tokenizer.json spells the token with this id."""
        self._check(token)
        name = self._backend.id_to_token(token)
        assert name is not None, "every id below V has a token"
        return name

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`; nothing is put before or after it.

        Args:
          text: any.
          special: whether what spells a special token becomes that token, as in the text of a chat template.
        Raises:
          InputError: `text` holds a lone surrogate, which no UTF-8 can say.
        """
        if not special:
            return self.encode_batch([text])[0]
        _check_unicode(text)
        return self._parsing_backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, over all cores; none is special. Raises as `encode`."""
        for text in texts:
            _check_unicode(text)
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_marked(self, text: str, plain: Mapping[str, str]) -> list[int]:
        """As `encode(text, special=True)`, but what spells a special token by a mark is text.

        Args:
          text: any.
          plain: marks that may stand in `text`, and the texts that they stand for, which become no special tokens. The
            rest of a run of text between special tokens is cut together with them; SentencePiece's space may come
            before such a run.
        Raises:
          InputError: as `encode`.
        """
        _check_unicode(text)
        encoding = self._parsing_backend.encode(text, add_special_tokens=False)
        ids: list[int] = []
        run: list[int] = []
        begin = 0
        for token, (start, end) in (*zip(encoding.ids, encoding.offsets, strict=True), (None, (len(text), 0))):
            if token is not None and token not in self._special:
                run.append(token)
                continue
            between = text[begin:start]
            if any(mark in between for mark in plain):
                for mark, spelled in plain.items():
                    between = between.replace(mark, spelled)
                run = self.encode(between)
            ids += run if token is None else [*run, token]
            run, begin = [], end
        return ids

    def find_special(self, text: str) -> str | None:
        """The first special token that `text` spells; None if it is but text. Raises as `encode`."""
        special = (token for token in self.encode(text, special=True) if token in self._special)
        return next(map(self.name, special), None)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens, special tokens left out; bytes that are not UTF-8 (a cut character) become U+FFFD.

        Raises:
          InputError: an id is not in 0..V-1.
        """
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.adds_space else text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """What the tokens stand for as they are, whatever stands before them. Raises as `decode`."""
        ids = [int(token) for token in ids]
        for token in ids:
            self._check(token)
        return b"".join([self._pieces[token] for token in ids])

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise InputError(f"token id {token} is out of range; valid are 0 to {self.vocab_size - 1}")

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        """Ids of special tokens; other added ones (Qwen's <think>) are text like any other."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    @functools.cached_property
    def _parsing_backend(self) -> tokenizers.Tokenizer:
        """Another one that turns text into special tokens: the flag is the backend's, and threads may share that."""
        return tokenizers.Tokenizer.from_str(self._backend.to_str())


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"character {text[error.start]!r} at {error.start} of the text is not Unicode") from error


def _read_text(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the tokenizer {path}: {error}") from error


def _parse(content: str, path: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # `tokenizers` raises bare Exception for every fault of the content
        raise InputError(f"{path} is not a tokenizer.json: {' '.join(str(error).split())}") from error


def _drop_added(content: str, vocab: int) -> str:
    """A tokenizer.json without the special tokens whose ids are `vocab` or more."""
    fields = json.loads(content)
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["id"] < vocab or not token["special"]]
    return json.dumps(fields)
