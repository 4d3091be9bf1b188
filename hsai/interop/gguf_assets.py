"""A GGUF file's tokenizer and what it says beside, as the files of Hugging Face that travel with our models; and back.

tokenizer_config.json tells which tokens begin and end a text, generation_config.json which end an answer, and
chat_template.jinja how to talk to the model.
"""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.interop.assets import TOKENIZER_CONFIG
from hsai.interop.gguf_tokenizer import GgufTokenizer

CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"


def make_tokenizer(found: GgufTokenizer, path: str) -> Tokenizer:
    """Our tokenizer; raises `InputError` if it cannot be used, with the file's name."""
    try:
        return Tokenizer(found.backend, end_of_text=found.eos)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def make_assets(found: GgufTokenizer, max_length: int) -> dict[str, bytes]:
    """The files, by name."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({} if found.bos is None else {"bos_token": found.bos}),
        "eos_token": found.eos,
        "add_bos_token": found.add_bos,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    stops = [found.backend.token_to_id(stop) for stop in found.stops]
    generation = {"eos_token_id": stops if len(stops) > 1 else stops[0]}
    files = {TOKENIZER_CONFIG: _encode(config), GENERATION_CONFIG: _encode(generation)}
    return files | ({} if found.chat_template is None else {CHAT_TEMPLATE: found.chat_template.encode()})


def gather_tokenizer(tokenizer: Tokenizer, assets: Mapping[str, bytes]) -> GgufTokenizer:
    """What a GGUF file is to say of a tokenizer.

    One without tokenizer_config.json was trained here: its end of text begins a text, too.

    Raises:
      InputError: a file is no JSON object, or names a token that the tokenizer does not have.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    end = backend.id_to_token(tokenizer.eot)
    assert end is not None, "a tokenizer has its end of text"
    if TOKENIZER_CONFIG not in assets:
        return GgufTokenizer(backend=backend, bos=end, eos=end, stops=(end,), add_bos=True, chat_template=None)
    config, generation = _decode(assets, TOKENIZER_CONFIG), _decode(assets, GENERATION_CONFIG)
    bos = _name(config.get("bos_token"), backend)
    adds = config.get("add_bos_token")
    if adds is None:
        ids = backend.encode("a", add_special_tokens=True).ids
        adds = bos is not None and ids[:1] == [backend.token_to_id(bos)]
    ids = generation.get("eos_token_id", tokenizer.eot)
    stops = [backend.id_to_token(index) for index in (ids if isinstance(ids, list) else [ids])]
    template = config.get("chat_template")
    if CHAT_TEMPLATE in assets:
        template = assets[CHAT_TEMPLATE].decode()
    return GgufTokenizer(
        backend=backend,
        bos=bos,
        eos=end,
        stops=tuple(dict.fromkeys([end, *(stop for stop in stops if stop is not None)])),
        add_bos=bool(adds) and bos is not None,
        chat_template=template if isinstance(template, str) else None,
    )


def _name(token: Any, backend: tokenizers.Tokenizer) -> str | None:
    """How a token is spelled that tokenizer_config.json names by its text, or by an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and (not isinstance(text, str) or backend.token_to_id(text) is None):
        raise InputError(f"{TOKENIZER_CONFIG}: the tokenizer has no token {text!r}")
    return text


def _encode(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _decode(assets: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(assets.get(name, b"{}"))
    except ValueError as error:
        raise InputError(f"{name} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{name} holds {type(content).__name__}, not an object")
    return content
