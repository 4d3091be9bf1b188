"""What travels beside weights and tokenizer: bytes as they are, and what they say, wherever a repository says it."""

import json
from pathlib import Path
from typing import Any

import pytest

from hsai.data.assets import ASSET_FILES, Assets, read_assets
from hsai.errors import InputError

FILES = {
    "chat_template.jinja": "{{ messages }}\r\n é".encode(),
    "generation_config.json": b'{"eos_token_id": [1, 2], "temperature": 0.5}',
    "tokenizer_config.json": '{"eos_token": {"content": "</s>"}, "bos_token": null, "unk_token": "<é>"}'.encode(),
    "special_tokens_map.json": b'{"eos_token": "<other>", "pad_token": "<pad>"}',
}


def test_files_are_read_as_they_are(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "model.py").write_text("no asset")
    assert read_assets(tmp_path) == FILES and set(FILES) < set(ASSET_FILES)
    assert read_assets(tmp_path, ["model.py", "tokenizer_config.json", "chat_template.json"]) == {
        "tokenizer_config.json": FILES["tokenizer_config.json"]
    }


def test_what_the_files_say() -> None:
    assert Assets.parse(FILES) == Assets(
        chat_template="{{ messages }}\r\n é",
        generation_config={"eos_token_id": [1, 2], "temperature": 0.5},
        special_tokens={"eos_token": "</s>", "unk_token": "<é>", "pad_token": "<pad>"},
    )
    assert Assets.parse({}) == Assets()


@pytest.mark.parametrize(
    "template", ["old", [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "old"}]]
)
def test_a_template_in_another_file(template: Any) -> None:
    files = {"tokenizer_config.json": json.dumps({"a": 1, "chat_template": template}).encode()}
    assert Assets.parse(files).chat_template == "old"
    files |= {"chat_template.json": b'{"chat_template": "newer"}'}
    assert Assets.parse(files).chat_template == "newer"
    assert Assets.parse(files | {"chat_template.jinja": b"newest"}).chat_template == "newest"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", b"[1]", "generation_config.json holds list, not an object"),
        ("generation_config.json", b"{", "generation_config.json is not a JSON file: .* at line 1 column 2"),
        ("generation_config.json", b"\xff", "generation_config.json: byte 0 is not UTF-8"),
        ("tokenizer_config.json", b'{"chat_template": 7}', "chat_template is neither a text nor a list"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "rag"}]}', "chat_template is neither a text nor a"),
        ("chat_template.jinja", b"a\xff", "chat_template.jinja: byte 1 is not UTF-8"),
    ],
)
def test_files_that_cannot_be(name: str, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Assets.parse({name: content})
