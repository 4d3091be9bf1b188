"""What travels beside weights and tokenizer: read as it was written, wherever a repository keeps it."""

import json
from pathlib import Path
from typing import Any

import pytest

from hsai.data.assets import ASSET_FILES, Assets
from hsai.errors import InputError

ASSETS = Assets(
    chat_template="{{ messages }}\r\n\n é",
    generation_config={"eos_token_id": [1, 2], "temperature": 0.5},
    tokenizer_config={"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": None, "unk_token": "<é>"},
)


def test_assets_are_read_as_they_were_written(tmp_path: Path) -> None:
    ASSETS.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ASSET_FILES)
    assert Assets.read(tmp_path) == ASSETS
    assert Assets.read(tmp_path, ["generation_config.json"]) == Assets(generation_config=ASSETS.generation_config)
    assert ASSETS.special_tokens() == {"eos_token": "</s>", "unk_token": "<é>"}


def test_what_is_absent_has_no_file(tmp_path: Path) -> None:
    Assets().write(tmp_path)
    assert list(tmp_path.iterdir()) == [] and Assets.read(tmp_path) == Assets()


@pytest.mark.parametrize(
    "template", ["old", [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "old"}]]
)
def test_a_template_inside_the_tokenizer_config(template: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"a": 1, "chat_template": template}))
    assert Assets.read(tmp_path) == Assets(chat_template="old", tokenizer_config={"a": 1})
    (tmp_path / "chat_template.jinja").write_text("new")
    assert Assets.read(tmp_path).chat_template == "new"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", b"[1]", "generation_config.json holds list, not an object"),
        ("generation_config.json", b"{", "generation_config.json is not a JSON file"),
        ("tokenizer_config.json", b'{"chat_template": 7}', "chat_template is neither a text nor a list"),
        (
            "tokenizer_config.json",
            b'{"chat_template": [{"name": "rag"}]}',
            "chat_template is neither a text nor a list",
        ),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is no chat template: byte 0 is not UTF-8"),
    ],
)
def test_files_that_cannot_be(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        Assets.read(tmp_path)
