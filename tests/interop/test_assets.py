"""What transformers is told of a tokenizer that came without a word."""

import json

import tokenizers

from hsai.data.tokenizer import END_OF_TEXT, Tokenizer
from hsai.interop.assets import describe_tokenizer, name_tokens
from tests.export.tiny_models import make_tokenizer


def test_ours_begins_and_ends_with_one_token() -> None:
    tokenizer = make_tokenizer()
    assert name_tokens(tokenizer) == {"bos_token_id": 0, "eos_token_id": 0}
    content = json.loads(describe_tokenizer(tokenizer, 64))
    assert (content["bos_token"], content["eos_token"], content["model_max_length"]) == (END_OF_TEXT, END_OF_TEXT, 64)


def test_others_may_have_no_prefix_and_several_stops() -> None:
    backend = tokenizers.Tokenizer.from_str(make_tokenizer().to_json())
    backend.add_special_tokens(["<stop>"])
    tokenizer = Tokenizer(backend, prefix=(), stops=("<stop>",))
    assert name_tokens(tokenizer) == {"bos_token_id": None, "eos_token_id": [0, 280]}
    content = json.loads(describe_tokenizer(tokenizer, 64))
    assert (content["bos_token"], content["eos_token"]) == (None, END_OF_TEXT)
