"""What lies beside the weights of a checkpoint and travels with the model as it is: bytes in, the same bytes out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hsai.data.tokenizer import END_OF_TEXT, Tokenizer
from hsai.errors import InputError
from hsai.files import read_json

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ASSETS = (
    TOKENIZER_CONFIG,
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "special_tokens_map.json",
)
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_assets(directory: Path) -> dict[str, bytes]:
    """Those of ASSETS that a checkpoint, a bundle or a run has, by name."""
    return {name: (directory / name).read_bytes() for name in ASSETS if (directory / name).is_file()}


def read_tokenizer(directory: Path, raw: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
      directory: of the checkpoint.
      raw: the content of its config.json, which may say which token ends a text.
    Raises:
      InputError: there is none, or it cannot be used.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        raise InputError(f"{directory} has no {TOKENIZER}; a tokenizer in another form is not read")
    return Tokenizer.load(path, end_of_text=_find_end_of_text(directory, raw))


def describe_tokenizer(tokenizer: Tokenizer, max_length: int) -> bytes:
    """A tokenizer_config.json, by which `transformers` loads a tokenizer of ours."""
    end = next(token for token in json.loads(tokenizer.to_json())["added_tokens"] if token["id"] == tokenizer.eot)
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end["content"],
        "eos_token": end["content"],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _find_end_of_text(directory: Path, raw: Mapping[str, Any]) -> str:
    """By tokenizer_config.json or, where it does not say, by the id in config.json."""
    if (directory / TOKENIZER_CONFIG).is_file():
        token = read_json(directory / TOKENIZER_CONFIG).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    wanted = raw.get("eos_token_id")
    wanted = wanted[0] if isinstance(wanted, list) and wanted else wanted
    for token in read_json(directory / TOKENIZER).get("added_tokens", []):
        if wanted is not None and token["id"] == wanted:
            return str(token["content"])
    return END_OF_TEXT
