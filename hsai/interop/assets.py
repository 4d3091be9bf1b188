"""What `transformers` has to be told of a tokenizer that was trained here."""

import json

from hsai.data.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


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
