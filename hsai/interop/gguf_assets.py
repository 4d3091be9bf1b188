"""A GGUF file's tokenizer and what it says beside, as the files of Hugging Face that travel with our models; and back.

tokenizer_config.json tells which tokens begin and end a text, generation_config.json which end an answer, and
chat_template.jinja how to talk to the model.
"""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from hsai.data.assets import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER_CONFIG
from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.interop.gguf_tokenizer import GgufTokenizer


def make_tokenizer(found: GgufTokenizer, path: str) -> Tokenizer:
    """Our tokenizer; raises `InputError` if it cannot be used, with the file's name."""
    prefix = [found.bos] if found.add_bos and found.bos is not None else []
    try:
        return Tokenizer(found.backend, end_of_text=found.eos, prefix=prefix, stops=found.stops)
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

    Raises:
      InputError: several tokens stand before a text; a file is no JSON object, or names a token that there is not.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    if len(tokenizer.prefix) > 1:
        names = ", ".join(map(tokenizer.name, tokenizer.prefix))
        raise InputError(f"a text begins with the tokens {names}; GGUF can say one")
    config, end = _decode(assets, TOKENIZER_CONFIG), tokenizer.name(tokenizer.eot)
    adds = bool(tokenizer.prefix)
    stops = [tokenizer.name(stop) for stop in sorted(tokenizer.stops)]
    template = config.get("chat_template")
    if CHAT_TEMPLATE in assets:
        template = assets[CHAT_TEMPLATE].decode()
    return GgufTokenizer(
        backend=backend,
        bos=tokenizer.name(tokenizer.prefix[0]) if adds else _name(config.get("bos_token"), backend),
        eos=end,
        stops=tuple(dict.fromkeys([end, *stops])),
        add_bos=adds,
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
