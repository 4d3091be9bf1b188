"""What travels with a model beside weights and tokenizer: chat template, generation config, tokenizer config.

The files are Hugging Face's, under their names. Nothing here is needed to run a model; it says how it is meant to be
talked to, and it must survive every way in and out.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hsai.errors import InputError
from hsai.files import atomic_write, read_json, write_json_atomic

CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ASSET_FILES = (CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER_CONFIG)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assets:
    """Each part may be absent; an absent one has no file."""

    chat_template: str | None = None
    """Jinja: messages in, the text of a prompt out (`hsai.data.chat`)."""

    generation_config: Mapping[str, Any] | None = None
    """How the model's makers sample from it, and its stop tokens; JSON."""

    tokenizer_config: Mapping[str, Any] | None = None
    """Special tokens by their roles, such as bos_token; JSON, without a chat template."""

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> "Assets":
        """Those in `directory`; older repositories keep the chat template inside tokenizer_config.json.

        Raises:
          InputError: a file is no UTF-8, no JSON, or no object.
        """
        directory = Path(directory)
        tokenizer = _read_object(directory / TOKENIZER_CONFIG)
        template = None
        if tokenizer is not None:
            tokenizer, template = _take_template(tokenizer, directory / TOKENIZER_CONFIG)
        path = directory / CHAT_TEMPLATE
        if path.is_file():
            try:
                template = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path} is no chat template: byte {error.start} is not UTF-8") from error
        generation = _read_object(directory / GENERATION_CONFIG)
        return cls(chat_template=template, generation_config=generation, tokenizer_config=tokenizer)

    def write(self, directory: Path) -> None:
        """Writes what is there into `directory`, which exists."""
        if self.chat_template is not None:
            with atomic_write(directory / CHAT_TEMPLATE) as temporary:
                temporary.write_bytes(self.chat_template.encode("utf-8"))
        for name, content in ((GENERATION_CONFIG, self.generation_config), (TOKENIZER_CONFIG, self.tokenizer_config)):
            if content is not None:
                write_json_atomic(directory / name, dict(content))

    def special_tokens(self) -> dict[str, str]:
        """Tokens by their roles (bos_token, eos_token, ...), as a chat template is given them."""
        config = self.tokenizer_config or {}
        found = {name: token_text(value) for name, value in config.items() if name.endswith("_token")}
        return {name: text for name, text in found.items() if text is not None}


def token_text(value: Any) -> str | None:
    """The token that an entry such as bos_token names: by its text, or by an object with its `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_object(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, or None if there is no such file."""
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not an object")
    return content


def _take_template(config: dict[str, Any], path: Path) -> tuple[dict[str, Any], str | None]:
    """The config without its chat template, and that template; of several with names, the one called default."""
    rest = {name: value for name, value in config.items() if name != "chat_template"}
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return rest, template
    if isinstance(template, list) and all(isinstance(entry, Mapping) for entry in template):
        for entry in template:
            if entry.get("name") == "default" and isinstance(entry.get("template"), str):
                return rest, entry["template"]
    raise InputError(f"{path}: chat_template is neither a text nor a list with one named 'default'")
