"""The tokenizer of a GGUF file as a Hugging Face `tokenizers` object that gives the ids of llama.cpp.

Two kinds are read: byte-level BPE ("gpt2"), and SentencePiece's BPE ("llama"), whose scores become merges. Text is not
normalized, as in llama.cpp: tokenizer.json of Qwen composes characters first (NFC), which no GGUF file says.
"""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, decoders, models, normalizers, processors

from hsai.errors import InputError
from hsai.interop.gguf_container import Metadata, quote
from hsai.interop.gguf_splits import Split, get_split

SPACE = "\u2581"
"""How SentencePiece spells a space."""
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>")
"""What llama.cpp stops at where a file does not say."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """A tokenizer, and what its file says besides."""

    backend: tokenizers.Tokenizer
    """With `add_special_tokens`, it puts the beginning and end of text that the file asks for."""

    bos: str | None
    """The token that begins a text."""

    eos: str
    """The token that ends one."""

    stops: tuple[str, ...]
    """All tokens that end an answer: that of a text, and that of a turn."""

    add_bos: bool
    """Whether a text is begun with `bos`."""

    chat_template: str | None
    """Jinja."""


def read_tokenizer(metadata: Metadata, vocab: int) -> GgufTokenizer:
    """The tokenizer of a file whose embedding has `vocab` rows.

    Raises:
      InputError: it is of a kind or has a pre-tokenizer that is not read; it has more tokens than the embedding has
        rows; its lists do not fit one another.
    """
    path = metadata.path
    kind = metadata.take("tokenizer.ggml.model", str)
    tokens = _read_tokens(metadata, vocab)
    types = _read_types(metadata, len(tokens))
    if kind == "gpt2":
        split = get_split(metadata.take("tokenizer.ggml.pre", str, "default"), str(path))
        backend, adds_bos = _build_byte_level(metadata, tokens, split), split.add_bos
        defaults = {"bos": 11, "eos": 11}
    elif kind == "llama":
        backend, adds_bos = _build_sentencepiece(metadata, tokens, types), True
        defaults = {"bos": 1, "eos": 2}
    else:
        raise InputError(f"{path}: the tokenizer {quote(kind)} is not read; those that are: gpt2, llama")
    for index, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if type_ in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.UNKNOWN):
            special = type_ != TokenType.USER_DEFINED
            backend.add_tokens([AddedToken(token, special=special, normalized=False)])
            if backend.token_to_id(token) != index:
                raise InputError(f"{path}: the token {quote(token)} stands there twice")
    bos, eos, eot = (_read_special(metadata, tokens, name, defaults.get(name)) for name in ("bos", "eos", "eot"))
    if eos is None:
        raise InputError(f"{path}: its tokenizer names no token that ends a text (tokenizer.ggml.eos_token_id)")
    if eot is None:
        eot = next((token for token in _END_OF_TURN if token in tokens), None)
    add_bos = metadata.take("tokenizer.ggml.add_bos_token", bool, adds_bos) and bos is not None
    add_eos = metadata.take("tokenizer.ggml.add_eos_token", bool, False)
    _add_ends(backend, bos if add_bos else None, eos if add_eos else None)
    return GgufTokenizer(
        backend=backend,
        bos=bos,
        eos=eos,
        stops=tuple(dict.fromkeys(token for token in (eos, eot) if token is not None)),
        add_bos=add_bos,
        chat_template=metadata.take("tokenizer.chat_template", str, "") or None,
    )


def _read_tokens(metadata: Metadata, vocab: int) -> list[str]:
    """The tokens' spellings; unused ones at the end, which pad the embedding, are left out."""
    tokens: list[str] = metadata.take("tokenizer.ggml.tokens", list)
    if len(tokens) > vocab:
        raise InputError(f"{metadata.path}: its tokenizer has {len(tokens)} tokens, and its embedding {vocab} rows")
    types = _read_types(metadata, len(tokens))
    while types and types[-1] == TokenType.UNUSED:
        types.pop()
    tokens = tokens[: len(types)]
    if not tokens:
        raise InputError(f"{metadata.path}: its tokenizer has no tokens")
    if len(set(tokens)) < len(tokens):
        twice = max(tokens, key=Counter(tokens).__getitem__)
        raise InputError(f"{metadata.path}: the token {quote(twice)} stands there twice")
    return tokens


def _read_types(metadata: Metadata, count: int) -> list[int]:
    """The type of each token; the list in the file may be longer than the one asked for."""
    key = "tokenizer.ggml.token_type"
    if key not in metadata:
        return [int(TokenType.NORMAL)] * count
    types = metadata.take(key, np.ndarray)
    if len(types) < count or types.dtype.kind not in "iu":
        raise InputError(f"{metadata.path}: {key} has {len(types)} entries ({types.dtype}) for {count} tokens")
    return [int(type_) for type_ in types[:count]]


def _read_special(metadata: Metadata, tokens: list[str], name: str, default: int | None) -> str | None:
    """The spelling of the token that the file calls "bos", "eos" or "eot"."""
    key = f"tokenizer.ggml.{name}_token_id"
    if key in metadata:
        index = metadata.take(key, int)
        if not 0 <= index < len(tokens):
            raise InputError(f"{metadata.path}: {key}={index} is none of its {len(tokens)} tokens")
        return tokens[index]
    return tokens[default] if default is not None and default < len(tokens) else None


def _build_byte_level(metadata: Metadata, tokens: list[str], split: Split) -> tokenizers.Tokenizer:
    merges = []
    for merge in metadata.take("tokenizer.ggml.merges", list):
        at = merge.find(" ", 1)
        if at < 1:
            raise InputError(f"{metadata.path}: the merge {quote(merge)} is no pair of tokens")
        merges.append((merge[:at], merge[at + 1 :]))
    backend = _build_model(metadata, tokens, merges, ignore_merges=split.ignore_merges)
    backend.pre_tokenizer = split.build()
    backend.decoder = decoders.ByteLevel()
    return backend


def _build_sentencepiece(metadata: Metadata, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    scores = metadata.take("tokenizer.ggml.scores", np.ndarray)
    if len(scores) < len(tokens) or not np.all(np.isfinite(scores)):
        raise InputError(f"{metadata.path}: tokenizer.ggml.scores are not a finite number for each of its tokens")
    unknown = next((token for token, type_ in zip(tokens, types, strict=True) if type_ == TokenType.UNKNOWN), None)
    merged = {t: i for i, t in enumerate(tokens) if types[i] in (TokenType.NORMAL, TokenType.UNUSED)}
    merges = list_merges(merged, scores.tolist())
    backend = _build_model(metadata, tokens, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown)
    prefix = metadata.take("tokenizer.ggml.add_space_prefix", bool, True)
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return backend


def list_merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that make the pieces of `vocabulary` in the order of their scores, highest first.

    SentencePiece joins the two neighbours that make the piece with the highest score. A merge is such a pair, and its
    place in the list is that score.
    """
    found = []
    for piece, index in vocabulary.items():
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[index], index, vocabulary[left], vocabulary[right], left, right))
    found.sort(key=lambda merge: merge[:4])
    return [(left, right) for *_, left, right in found]


def _build_model(
    metadata: Metadata, tokens: list[str], merges: list[tuple[str, str]], **options: Any
) -> tokenizers.Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise InputError(f"{metadata.path}: a merge makes or takes {quote(token)}, which is no token")
    return tokenizers.Tokenizer(models.BPE(vocabulary, merges, **options))


def _add_ends(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Makes the tokenizer put the tokens that begin and end a text, where special tokens are asked for."""
    ends = [token for token in (bos, eos) if token is not None]
    if ends:
        single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
        pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
        special = [(token, backend.token_to_id(token)) for token in dict.fromkeys(ends)]
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
