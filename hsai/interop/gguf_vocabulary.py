"""The metadata with which a GGUF file says a tokenizer: the inverse of `gguf_tokenizer`.

What llama.cpp would do in another way is refused: text must get the same ids there as here.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import TokenType

from hsai.errors import InputError
from hsai.interop.gguf_container import quote
from hsai.interop.gguf_splits import find_split
from hsai.interop.gguf_tokenizer import SPACE, GgufTokenizer, list_merges

_PREPEND = {"type": "Prepend", "prepend": SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def describe_tokenizer(tokenizer: GgufTokenizer, vocab: int) -> dict[str, Any]:
    """The keys below "tokenizer." of a file whose embedding has `vocab` rows: the rest of them get unused tokens.

    Raises:
      InputError: llama.cpp has no such tokenizer.
    """
    content = json.loads(tokenizer.backend.to_str())
    model, added = content["model"], {token["id"]: token for token in content["added_tokens"]}
    if model["type"] != "BPE" or any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise InputError(f"a tokenizer of the kind {model['type']} cannot be said in GGUF; BPE can")
    tokens = _list_tokens(model, added, vocab)
    types = [TokenType.UNUSED if token is None else TokenType.NORMAL for token in tokens]
    for index, token in added.items():
        types[index] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    values: dict[str, Any] = {}
    if model["byte_fallback"]:
        values |= _describe_sentencepiece(content, tokens, types, merges)
    else:
        values |= _describe_byte_level(content, merges)
    names = [f"[PAD{index}]" if token is None else token for index, token in enumerate(tokens)]
    if len(set(names)) < len(names):
        raise InputError("the tokenizer has tokens that are spelled as unused ones are in GGUF, [PAD...]")
    ids = {token: index for index, token in enumerate(names)}
    values |= {"tokens": names, "token_type": [int(type_) for type_ in types], "eos_token_id": ids[tokenizer.eos]}
    if tokenizer.bos is not None:
        values["bos_token_id"] = ids[tokenizer.bos]
    if len(turn := [stop for stop in tokenizer.stops if stop != tokenizer.eos]) > 1:
        raise InputError(f"an answer ends at {quote([tokenizer.eos, *turn])}; GGUF can say two such tokens")
    values["eot_token_id"] = ids[turn[0]] if turn else ids[tokenizer.eos]
    values |= {"add_bos_token": tokenizer.add_bos, "add_eos_token": False}
    named = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return named | ({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {})


def _list_tokens(model: Mapping[str, Any], added: Mapping[int, Any], vocab: int) -> list[str | None]:
    """The spelling of each token; None where there is none."""
    tokens: list[str | None] = [None] * vocab
    found = [*((index, token) for token, index in model["vocab"].items())]
    found += [(index, token["content"]) for index, token in added.items()]
    for index, token in found:
        if not 0 <= index < vocab:
            raise InputError(f"the tokenizer's {quote(token)} has id {index}, and the model {vocab} tokens")
        if tokens[index] not in (None, token):
            raise InputError(f"the tokenizer has two tokens with id {index}: {quote(tokens[index])} and {quote(token)}")
        tokens[index] = token
    return tokens


def _describe_byte_level(content: Mapping[str, Any], merges: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    model, normalizer = content["model"], content["normalizer"]
    if normalizer not in (None, {"type": "NFC"}):  # which llama.cpp leaves out for Qwen, too
        raise InputError(f"the tokenizer's normalizer {quote(normalizer)} cannot be said in GGUF")
    if any(" " in token for merge in merges for token in merge):
        raise InputError("the tokenizer merges tokens with a space in them; it is not byte-level")
    split = find_split(content["pre_tokenizer"], ignore_merges=model.get("ignore_merges", False))
    return {"model": "gpt2", "pre": split, "merges": [" ".join(merge) for merge in merges]}


def _describe_sentencepiece(
    content: Mapping[str, Any], tokens: Sequence[str | None], types: list[Any], merges: Sequence[tuple[str, ...]]
) -> dict[str, Any]:
    model = content["model"]
    prefix = _reads_prefix(content)
    for index, token in enumerate(tokens):
        if token is not None and types[index] == TokenType.NORMAL and token == _spell_byte(token):
            types[index] = TokenType.BYTE
    if sum(type_ == TokenType.BYTE for type_ in types) != 256:
        raise InputError("the tokenizer falls back to bytes, but has not 256 tokens for them")
    if (unknown := model["unk_token"]) is not None:
        types[tokens.index(unknown)] = TokenType.UNKNOWN
    # A piece's score is its place among the pieces that merges make.
    order = {piece: rank for rank, piece in enumerate(dict.fromkeys(left + right for left, right in merges))}
    scores = [-float(order.get(token or "", len(order))) for token in tokens]
    normal = {token: i for i, token in enumerate(tokens) if token is not None and types[i] == TokenType.NORMAL}
    if _group(list_merges(normal, scores)) != _group(merges):
        raise InputError(
            "the tokenizer's merges are not those of scores of its tokens, which GGUF keeps in their place"
        )
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}


def _reads_prefix(content: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text; refuses what llama.cpp does not do to text."""
    normalizer, cut = content["normalizer"] or {"type": "Sequence", "normalizers": []}, content["pre_tokenizer"]
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    by_space = cut is None or (cut["type"] == "Split" and cut["pattern"] == {"String": " "})
    if steps == [_PREPEND, _REPLACE] and cut is None:
        return True
    if steps == [_REPLACE] and by_space:
        return False
    if (
        not steps
        and cut is not None
        and cut["type"] == "Metaspace"
        and cut["replacement"] == SPACE
        and not cut["split"]
    ):
        return bool(cut["prepend_scheme"] != "never")
    raise InputError(
        f"the tokenizer's normalizer {quote(normalizer)} with {quote(cut)} has no counterpart in llama.cpp"
    )


def _spell_byte(token: str) -> str | None:
    """The token as it would be spelled if it is a byte: "<0x0A>"."""
    try:
        return f"<0x{int(token[3:5], 16):02X}>"
    except ValueError:
        return None


def _group(merges: Sequence[tuple[str, ...]]) -> list[tuple[str, set[tuple[str, ...]]]]:
    """Pieces in the order in which merges make them, each with its merges."""
    groups: dict[str, set[tuple[str, ...]]] = {}
    for merge in merges:
        groups.setdefault("".join(merge), set()).add(merge)
    return list(groups.items())
