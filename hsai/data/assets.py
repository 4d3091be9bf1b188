"""What travels with a model beside weights and tokenizer: chat template, generation config, tokenizer config.

The files are Hugging Face's, under their names, and travel as they are: bytes in, the same bytes out. `Assets` is what
they say to us.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hsai.errors import InputError

CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
OLD_CHAT_TEMPLATE = "chat_template.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ASSET_FILES = (CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER_CONFIG, OLD_CHAT_TEMPLATE, SPECIAL_TOKENS_MAP)


def read_assets(directory: Path, files: Collection[str] = ASSET_FILES) -> dict[str, bytes]:
    """Those of `ASSET_FILES` that a checkpoint or a bundle has, by name; of `files` only, others are not believed."""
    wanted = [name for name in ASSET_FILES if name in files]
    return {name: (directory / name).read_bytes() for name in wanted if (directory / name).is_file()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assets:
    """What the files say; what is absent says nothing."""

    chat_template: str | None = None
    """Jinja: messages in, the text of a prompt out (`hsai.data.chat`)."""

    generation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """How the model's makers sample from it, and its stop tokens."""

    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Tokens by their roles, such as bos_token, as a chat template is given them."""

    @classmethod
    def parse(cls, files: Mapping[str, bytes]) -> "Assets":
        """Reads the content of files by their names.

        The chat template stands in a file of its own, or in older repositories in one of two others; of several with
        names, it is the one called default.

        Raises:
          InputError: a file is no UTF-8, no JSON, or no object; a chat template is no text.
        """
        config = parse_object(files, TOKENIZER_CONFIG)
        template = _find_template(config, TOKENIZER_CONFIG)
        if OLD_CHAT_TEMPLATE in files:
            template = _find_template(parse_object(files, OLD_CHAT_TEMPLATE), OLD_CHAT_TEMPLATE)
        if CHAT_TEMPLATE in files:
            template = _decode(files, CHAT_TEMPLATE)
        roles = parse_object(files, SPECIAL_TOKENS_MAP) | config
        tokens = {name: token_text(value) for name, value in roles.items() if name.endswith("_token")}
        return cls(
            chat_template=template,
            generation_config=parse_object(files, GENERATION_CONFIG),
            special_tokens={name: text for name, text in tokens.items() if text is not None},
        )


def token_text(value: Any) -> str | None:
    """The token that an entry such as bos_token names: by its text, or by an object with its `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def parse_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The object in the JSON file `name`; an empty one if there is no such file.

    Raises:
      InputError: it is no UTF-8, no JSON, or no object.
    """
    if name not in files:
        return {}
    try:
        content = json.loads(_decode(files, name))
    except json.JSONDecodeError as error:
        fault = f"{error.msg} at line {error.lineno} column {error.colno}"
        raise InputError(f"{name} is not a JSON file: {fault}") from error
    if not isinstance(content, dict):
        raise InputError(f"{name} holds {type(content).__name__}, not an object")
    return content


def _decode(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: byte {error.start} is not UTF-8") from error


def _find_template(config: Mapping[str, Any], file: str) -> str | None:
    """The chat template inside a JSON file."""
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    if isinstance(template, list) and all(isinstance(entry, Mapping) for entry in template):
        for entry in template:
            if entry.get("name") == "default" and isinstance(entry.get("template"), str):
                return str(entry["template"])
    raise InputError(f"{file}: chat_template is neither a text nor a list with one named 'default'")
