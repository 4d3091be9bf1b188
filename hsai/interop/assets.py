"""What `transformers` has to be told of a tokenizer of ours, where nothing came with it that says so."""

import json
from typing import Any

import tokenizers
from tokenizers import processors

from hsai.data.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def describe_tokenizer(tokenizer: Tokenizer, max_length: int) -> bytes:
    """A tokenizer_config.json, by which `transformers` loads it."""
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.name(tokenizer.prefix[0]) if tokenizer.prefix else None,
        "eos_token": tokenizer.name(tokenizer.eot),
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def serialize_tokenizer(tokenizer: Tokenizer) -> bytes:
    """A tokenizer.json by which `transformers`, too, puts the prefix before a text: it asks no other file for that."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    count = len(tokenizer.prefix)
    if tuple(backend.encode("a").ids[:count]) != tokenizer.prefix:
        names = [tokenizer.name(token) for token in tokenizer.prefix]
        special = list(dict.fromkeys(zip(names, tokenizer.prefix, strict=True)))
        template = processors.TemplateProcessing(
            single=[*names, "$A"], pair=[*names, "$A", "$B:1"], special_tokens=special
        )
        before = backend.post_processor
        backend.post_processor = template if before is None else processors.Sequence([before, template])
    return (backend.to_str(pretty=True) + "\n").encode()


def name_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """What config.json says of it: the token before a text, and the one that ends an answer, or the several."""
    stops = [tokenizer.eot, *sorted(tokenizer.stops - {tokenizer.eot})]
    return {
        "bos_token_id": tokenizer.prefix[0] if tokenizer.prefix else None,
        "eos_token_id": stops if len(stops) > 1 else tokenizer.eot,
    }
