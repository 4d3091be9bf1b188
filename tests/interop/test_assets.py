"""What transformers is told of a tokenizer that came without a word."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from hsai.data.tokenizer import END_OF_TEXT, Tokenizer
from hsai.interop.assets import describe_tokenizer, name_tokens, serialize_tokenizer
from tests.export.tiny_models import make_tokenizer


def test_ours_begins_and_ends_with_one_token() -> None:
    tokenizer = make_tokenizer()
    assert name_tokens(tokenizer) == {"bos_token_id": 0, "eos_token_id": 0}
    content = json.loads(describe_tokenizer(tokenizer, 64))
    assert (content["bos_token"], content["eos_token"], content["model_max_length"]) == (END_OF_TEXT, END_OF_TEXT, 64)


@pytest.mark.parametrize("prefix", [(), (END_OF_TEXT,), ("<stop>", "<stop>")])
@pytest.mark.parametrize("processor", [None, processors.ByteLevel(trim_offsets=False)])
def test_the_prefix_is_in_the_file_once(prefix: tuple[str, ...], processor: Any, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(make_tokenizer().to_json())
    backend.add_special_tokens(["<stop>"])
    if processor is not None:
        backend.post_processor = processor
    tokenizer = Tokenizer(backend, prefix=prefix)
    content = serialize_tokenizer(tokenizer)
    assert tokenizers.Tokenizer.from_buffer(content).encode("def main").ids == [
        *tokenizer.prefix,
        *tokenizer.encode("def main"),
    ]
    for name, file in (("tokenizer.json", content), ("tokenizer_config.json", describe_tokenizer(tokenizer, 64))):
        (tmp_path / name).write_bytes(file)
    back = Tokenizer.from_huggingface(tmp_path)
    assert back.equals(tokenizer) and serialize_tokenizer(back) == content


def test_others_may_have_no_prefix_and_several_stops() -> None:
    backend = tokenizers.Tokenizer.from_str(make_tokenizer().to_json())
    backend.add_special_tokens(["<stop>"])
    tokenizer = Tokenizer(backend, prefix=(), stops=("<stop>",))
    assert name_tokens(tokenizer) == {"bos_token_id": None, "eos_token_id": [0, 280]}
    content = json.loads(describe_tokenizer(tokenizer, 64))
    assert (content["bos_token"], content["eos_token"]) == (None, END_OF_TEXT)
