"""Which tokens of a Hugging Face tokenizer stand before a text, and which end one.

tokenizer.json does not say it all: tokenizer_config.json names tokens by their roles, and what ends an answer stands in
generation_config.json, or else in config.json. What transformers does with these files is done here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import tokenizers

from hsai.data.assets import token_text
from hsai.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRoles:
    """Tokens by their text."""

    end_of_text: str
    """What ends a document."""

    prefix: tuple[str, ...]
    """What stands before a text; none in some families."""

    stops: tuple[str, ...]
    """What ends an answer, `end_of_text` among them."""


def find_roles(
    backend: tokenizers.Tokenizer,
    tokenizer_config: Mapping[str, Any],
    special_tokens_map: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    config: Mapping[str, Any],
) -> TokenRoles:
    """Reads the roles from the content of the files of these names; one that is absent is empty.

    Raises:
      InputError: no file names an end-of-text token, or a file names one that the tokenizer does not have.
    """

    def name(role: str) -> str | None:
        text = token_text(tokenizer_config.get(role, special_tokens_map.get(role)))
        if text is not None and backend.token_to_id(text) is None:
            raise InputError(f"{role} {text!r} of tokenizer_config.json is not in the tokenizer")
        return text

    stops: list[str] = []
    for file, content in (("generation_config.json", generation_config), ("config.json", config)):
        if not stops:
            stops = [_name(backend, index, file) for index in _list_ids(content.get("eos_token_id"), file)]
    end = name("eos_token") or (stops[0] if stops else None)
    if end is None:
        raise InputError("no end-of-text token: neither tokenizer_config.json nor generation_config.json names one")
    return TokenRoles(
        end_of_text=end,
        prefix=_find_prefix(backend, tokenizer_config.get("add_bos_token"), name("bos_token")),
        stops=tuple(dict.fromkeys([end, *stops])),
    )


def _find_prefix(backend: tokenizers.Tokenizer, add_bos: Any, bos: str | None) -> tuple[str, ...]:
    """Where tokenizer_config.json does not say whether a text begins with bos_token, tokenizer.json does."""
    if add_bos is not None:
        return (bos,) if add_bos and bos is not None else ()
    encoding = backend.encode("a", add_special_tokens=True)
    whole = encoding.ids
    text = backend.encode("a", add_special_tokens=False).ids
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return tuple(encoding.tokens[:start])
    raise InputError(f"the tokenizer puts its special tokens into the text, and not around it: {whole}")


def _list_ids(value: Any, file: str) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(index) is int for index in ids):
        raise InputError(f"{file}: eos_token_id {value!r} is neither an integer nor a list of them")
    return ids


def _name(backend: tokenizers.Tokenizer, index: int, file: str) -> str:
    token = backend.id_to_token(index) if index >= 0 else None
    if token is None:
        raise InputError(f"{file}: eos_token_id {index} is not in the tokenizer")
    return token
