"""Conversations, and texts that other tokens begin and end than those of a model that was trained here."""

import pytest
import tokenizers

from hsai.data.assets import Assets
from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.infer import Engine
from tests.export.tiny_models import CHATTY_ASSETS, make_chatty_tokenizer


def test_the_engine_answers_through_the_template(engine: Engine) -> None:
    tokenizer = make_chatty_tokenizer()
    chatty = Engine(engine.runtime, tokenizer, Assets.parse(CHATTY_ASSETS))
    ids = tokenizer.encode("<|user|>hello<|assistant|>", special=True)
    done = chatty.chat([{"role": "user", "content": "hello"}], max_tokens=4)
    assert done.tokens == chatty.generate_tokens(ids, max_tokens=4).tokens
    assert done.prompt_tokens == len(ids) < len(tokenizer.encode("<|user|>hello<|assistant|>"))
    begun = chatty.chat([{"role": "user", "content": "hello"}], prefill=chatty.tokenizer.decode(done.tokens[:2]))
    assert begun.prompt_tokens > done.prompt_tokens
    with pytest.raises(InputError, match="no chat template"):
        engine.chat([{"role": "user", "content": "hello"}])


def test_the_prefix_stands_before_a_text(engine: Engine) -> None:
    tokenizer = make_chatty_tokenizer()
    other = Engine(engine.runtime, tokenizer)
    done = other.generate("hello", max_tokens=4)
    ids = [*tokenizer.prefix, *tokenizer.encode("hello")]
    assert tokenizer.name(ids[0]) == "<|begin|>" and done.prompt_tokens == len(ids)
    assert done.tokens == other.generate_tokens(ids, max_tokens=4).tokens


def test_any_stop_ends_a_text(engine: Engine, tokenizer: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    tokens = engine.generate("def", max_tokens=8).tokens
    stop = next(token for token in tokens[1:] if token != tokens[0])
    stopping = Tokenizer(backend, stops=(tokenizer.name(stop),))
    done = Engine(engine.runtime, stopping).generate("def", max_tokens=8)
    assert done.finish_reason == "end_of_text" and done.tokens == tokens[: tokens.index(stop)] != ()


def test_without_a_prefix_an_empty_text_begins_with_the_end_of_another(engine: Engine, tokenizer: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    bare = Engine(engine.runtime, Tokenizer(backend, prefix=()))
    assert bare.generate("", max_tokens=3).tokens == engine.generate("", max_tokens=3).tokens
    assert bare.generate("def", max_tokens=1).prompt_tokens == len(tokenizer.encode("def"))
