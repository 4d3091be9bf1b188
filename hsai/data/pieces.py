"""The bytes that each token of a vocabulary stands for: what makes losses comparable per byte, and text from tokens.

Two ways to cover every text are read. Byte-level BPE (GPT-2) writes each byte as one character of a fixed alphabet.
SentencePiece's BPE with byte fallback (Llama 2, Mistral, Gemma) writes a space as U+2581, and what it has no token for
as bytes, <0x00> to <0xFF>. A text that holds U+2581 itself is read as if that were a space.
"""

import functools
import json
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from hsai.errors import InputError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece writes a space."""

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""How SentencePiece writes a byte."""


def list_pieces(backend: tokenizers.Tokenizer) -> list[bytes]:
    """The bytes of every token, by id; none for special tokens, which no text turns into.

    Raises:
      InputError: the tokenizer does not cover every text, changes it beyond Unicode's canonical composition (NFC), or
        its ids are not 0..V-1.
    """
    _check_normalizer(backend)
    vocab_size = backend.get_vocab_size(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    has_fallback = bool(getattr(backend.model, "byte_fallback", False))
    if has_fallback and (missing := [t for t in BYTE_TOKENS if backend.token_to_id(t) is None]):
        raise InputError(f"the tokenizer has no token {missing[0]!r}, so it does not cover every text")
    spell = _spell_fallback if has_fallback else _spell_byte_level
    pieces = [b""] * vocab_size
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if not 0 <= index < vocab_size:
            raise InputError(
                f"token {token!r} has id {index}, beyond the vocabulary's {vocab_size}; ids must be 0..V-1"
            )
        if index not in added:
            pieces[index] = spell(token)
        elif not added[index].special:
            # Spelled as plain text; with fallback, U+2581 is a space there too (Gemma adds runs of them).
            pieces[index] = spell(token) if has_fallback else token.encode()
    return pieces


def _spell_fallback(token: str) -> bytes:
    if len(token) == 6 and token in _BYTES:
        return _BYTES[token]
    return token.replace(SPACE, " ").encode()


def _spell_byte_level(token: str) -> bytes:
    try:
        return bytes(map(_alphabet().__getitem__, token))
    except KeyError as error:
        raise InputError(
            f"token {token!r} is not made of bytes; only byte-level BPE, and BPE with byte fallback, can be used"
        ) from error


_BYTES = {token: bytes([byte]) for byte, token in enumerate(BYTE_TOKENS)}


@functools.cache
def _alphabet() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for.

    Printable characters of Latin-1 stand for themselves, and the other bytes, in order, for what follows U+00FF; the
    sorted alphabet therefore begins with the former.
    """
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {character: ord(character) for character in characters if ord(character) < 256}
    rest = [byte for byte in range(256) if byte not in own.values()]
    return own | dict(zip((c for c in characters if ord(c) >= 256), rest, strict=True))


def _check_normalizer(backend: tokenizers.Tokenizer) -> None:
    """Refuses normalizers after which a token's bytes are not those of the text."""
    if backend.normalizer is None:
        return
    pending: list[Any] = [json.loads(backend.normalizer.__getstate__())]
    while pending:
        step = pending.pop()
        kind = step["type"]
        if kind == "Sequence":
            pending += step["normalizers"]
        elif kind == "Prepend":
            lossless = step["prepend"] == SPACE
        elif kind == "Replace":
            lossless = step["pattern"] == {"String": " "} and step["content"] == SPACE
        else:
            lossless = kind == "NFC"
        if kind != "Sequence" and not lossless:
            raise InputError(f"the tokenizer's normalizer {kind} changes the text; its tokens have no bytes of it")
