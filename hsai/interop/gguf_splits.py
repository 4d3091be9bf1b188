"""How byte-level tokenizers cut text before they merge: the pre-tokenizers of llama.cpp, by their names in GGUF files.

A name stands for regular expressions (src/llama-vocab.cpp), each of which cuts the pieces that the one before left. In
tokenizer.json the same cuts are said in several ways; `find_split` knows those of the families that we export.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, pre_tokenizers

from hsai.errors import InputError
from hsai.interop.gguf_container import quote


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """A pre-tokenizer."""

    patterns: tuple[str, ...]
    """Regular expressions; a piece is what one of them matches, or what lies between its matches."""

    ignore_merges: bool = False
    """A piece that is a token is that token, whatever the merges would make of it."""

    add_bos: bool = False
    """llama.cpp's default for a file that does not say."""

    def build(self) -> Any:
        """The pre-tokenizer, for Hugging Face's `tokenizers`."""
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_DIGIT = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
    r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

SPLITS: Mapping[str, Split] = {
    "default": Split(patterns=_DEFAULT),
    **dict.fromkeys(("gpt-2", "mpt", "olmo"), Split(patterns=(_GPT2,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "command-r"), Split(patterns=(_DIGIT, _GPT2))),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Split(patterns=(_LLAMA3,), ignore_merges=True, add_bos=True)),
    **dict.fromkeys(("smaug-bpe", "dbrx"), Split(patterns=(_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), Split(patterns=(_QWEN2,))),
    "tekken": Split(patterns=(_TEKKEN,), ignore_merges=True, add_bos=True),
}
"""By the value of tokenizer.ggml.pre; of several names for the same, the first is written."""

# How released tokenizer.json files say what llama.cpp says otherwise.
_SAME = {
    _LLAMA3.replace(_CONTRACTIONS, "(?i:'s|'t|'re|'ve|'m|'ll|'d)"): _LLAMA3,
    _QWEN2.replace(_CONTRACTIONS, "(?i:'s|'t|'re|'ve|'m|'ll|'d)"): _QWEN2,
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": _TEKKEN,
}


def get_split(name: str, path: str) -> Split:
    """The split that a file names; raises `InputError` for one that is not known, since text would be cut otherwise."""
    if name not in SPLITS:
        raise InputError(f"{path}: the pre-tokenizer {quote(name)} is not read; those that are: {', '.join(SPLITS)}")
    return SPLITS[name]


def find_split(pre_tokenizer: Mapping[str, Any] | None, *, ignore_merges: bool) -> str:
    """The name in GGUF files of a byte-level pre-tokenizer, as tokenizer.json has it.

    Raises:
      InputError: it is none of those in `SPLITS`.
    """
    patterns: list[str] = []
    parts = _flatten(pre_tokenizer)
    for part in parts:
        pattern = _read_pattern(part)
        patterns += [] if pattern is None else [_SAME.get(pattern, pattern)]
    for name, split in SPLITS.items():
        if split.patterns == tuple(patterns) and split.ignore_merges == ignore_merges and parts:
            return name
    raise InputError(
        f"the tokenizer cuts text by {quote(patterns)} (ignore_merges={ignore_merges}), for which llama.cpp has no name"
    )


def _flatten(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [part for inner in pre_tokenizer["pretokenizers"] for part in _flatten(inner)]
    return [pre_tokenizer]


def _read_pattern(part: Mapping[str, Any]) -> str | None:
    """The regular expression that a part cuts by; None for one that only spells bytes."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": cut}:
            return _GPT2 if cut else None
        case {"type": "Digits", "individual_digits": True}:
            return _DIGIT
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return str(pattern)
    raise InputError(f"the tokenizer's {quote(dict(part))} has no counterpart in llama.cpp")
