"""The engine: where a text ends, what it refuses, and that a seed is a text."""

import gc
import math
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export import GraphConfig
from hsai.formats.storage import named_weights, replace_weights
from hsai.infer import Engine, SamplingConfig
from hsai.infer.runtime import TracedRuntime
from tests.export.tiny_models import full_logits, make_model


def test_greedy_text_is_that_of_repeated_full_forwards(engine: Engine, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.eot, *tokenizer.encode("def main")]
    prompt = len(ids)
    done = engine.generate("def main", max_tokens=6)
    for _ in range(6):
        ids.append(int(np.argmax(full_logits(make_model("dense"), np.array(ids))[-1, : tokenizer.vocab_size])))
    assert done.tokens == tuple(ids[prompt:])
    assert done.prompt_tokens == prompt
    assert done.finish_reason == "max_tokens"
    assert done.text == tokenizer.decode(done.tokens)


def test_pieces_make_the_text(engine: Engine) -> None:
    pieces: list[str] = []
    done = engine.generate("数据 def", max_tokens=30, sampling=SamplingConfig(temperature=2.0), on_text=pieces.append)
    assert len(pieces) >= 3 and all(pieces)  # one of the first token, one a block
    assert "".join(pieces) == done.text


def test_seed_decides_the_text(engine: Engine) -> None:
    def generate(seed: int) -> tuple[int, ...]:
        sampling = SamplingConfig(temperature=1.5, top_k=50, top_p=0.95, seed=seed)
        return engine.generate("return", max_tokens=12, sampling=sampling).tokens

    assert generate(1) == generate(1)
    assert generate(1) != generate(2)


def test_empty_prompt_starts_from_end_of_text(engine: Engine, tokenizer: Tokenizer) -> None:
    done = engine.generate("", max_tokens=5)
    assert done.prompt_tokens == 1
    assert done.tokens == engine.generate_tokens([tokenizer.eot], max_tokens=5).tokens


def test_text_ends_at_end_of_text(tokenizer: Tokenizer) -> None:
    model = make_model("dense", layers=1)
    # Without a last gain all logits are zero, and the first token of all, end of text, is taken.
    silent = replace_weights(model, {"final_norm.gain": named_weights(model)["final_norm.gain"].get_value() * 0})
    done = Engine.trace(silent, tokenizer).generate("hello", max_tokens=5)
    assert (done.finish_reason, done.tokens, done.text) == ("end_of_text", (), "")
    assert done.decode_steps == 0 and done.tokens_per_second == 0.0


@pytest.mark.parametrize("prompt", [1, 40, 47, 48])
def test_text_ends_with_the_context(prompt: int, engine: Engine, tokenizer: Tokenizer) -> None:
    """Of 48 slots the prompt takes some; the token after the last slot is made, and none after it."""
    assert engine.runtime.slots == 48
    ids = [7] * prompt
    done = engine.generate_tokens(ids, max_tokens=1000)
    assert done.finish_reason == "context"
    assert len(done.tokens) == 48 - prompt + 1
    expected = full_logits(make_model("dense"), np.array((ids + list(done.tokens))[:48]))
    assert done.tokens[-1] == int(np.argmax(expected[-1, : tokenizer.vocab_size]))


def test_max_tokens_comes_before_the_context(engine: Engine) -> None:
    assert engine.generate_tokens([7] * 48, max_tokens=1).finish_reason == "max_tokens"


def test_context_can_be_shortened(bundles: dict[str, Path], engine: Engine) -> None:
    short = Engine.load(bundles["dense"], context=10)
    assert short.runtime.slots == 10
    done = short.generate_tokens([7] * 4)
    assert done.tokens == engine.generate_tokens([7] * 4, max_tokens=7).tokens
    assert done.finish_reason == "context"
    with pytest.raises(InputError, match="context=49 exceeds the model's max_length=48"):
        Engine.load(bundles["dense"], context=49)
    with pytest.raises(InputError, match="context=10 cannot be chosen with graphs"):
        Engine.load(bundles["dense"], graphs=True, context=10)


def test_times_are_counted(engine: Engine) -> None:
    done = engine.generate("hello", max_tokens=4)
    assert done.seconds_prefill > 0 and done.seconds_decode > 0
    assert done.decode_steps == 3
    assert done.tokens_per_second == 3 / done.seconds_decode


def test_decode_speeds_are_rates(engine: Engine) -> None:
    speeds = engine.decode_speeds(tokens=8, repeats=3)
    assert len(speeds) == 3 and speeds == sorted(speeds)
    assert speeds[0] > 0 and math.isfinite(speeds[-1])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "the prompt has no tokens; an empty text begins with token 0"),
        ([1] * 49, {}, "the prompt has 49 tokens, and the context holds 48"),
        ([1, 280], {}, "token id 280 is out of range; valid are 0 to 279"),
        ([-1], {}, "token id -1 is out of range; valid are 0 to 279"),
        ([1], {"max_tokens": 0}, "max_tokens=0 must be at least 1"),
    ],
)
def test_prompt_that_cannot_be_is_refused(
    ids: list[int], options: dict[str, Any], message: str, engine: Engine
) -> None:
    with pytest.raises(InputError) as caught:
        engine.generate_tokens(ids, **options)
    assert str(caught.value) == message


def test_prompt_beyond_the_context_is_refused(engine: Engine, tokenizer: Tokenizer) -> None:
    prompt = "hello " * 60
    tokens = len(tokenizer.encode(prompt)) + 1
    with pytest.raises(InputError, match=f"the prompt has {tokens} tokens, and the context holds 48"):
        engine.generate(prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens=0 and repeats=9 must be at least 1"),
        ({"repeats": 0}, "tokens=64 and repeats=0 must be at least 1"),
        ({"tokens": 49}, "tokens=49 do not fit the context of 48"),
    ],
)
def test_speed_that_cannot_be_measured_is_refused(options: dict[str, int], message: str, engine: Engine) -> None:
    with pytest.raises(InputError, match=message):
        engine.decode_speeds(**options)


def test_a_string_is_not_its_characters(engine: Engine) -> None:
    with pytest.raises(InputError, match="stop is the string 'END'; valid is a sequence of strings"):
        engine.generate("def", stop="END")


def test_a_text_ends_before_a_stop_string(engine: Engine) -> None:
    """Also where it begins in one token and ends in another; nothing of it is shown."""
    whole = engine.generate("def", max_tokens=30, sampling=SamplingConfig(temperature=1.5, seed=1))
    assert len(whole.tokens) == 30
    parts = [engine.tokenizer.decode_bytes([token]) for token in whole.tokens]
    stop = next(
        text
        for first, second in zip(parts[5:], parts[6:], strict=False)
        if (text := (first[-1:] + second[:1]).decode("ascii", "ignore")) and len(text) == 2
    )
    shown: list[str] = []
    done = engine.generate(
        "def", max_tokens=30, sampling=SamplingConfig(temperature=1.5, seed=1), stop=(stop,), on_text=shown.append
    )
    assert done.finish_reason == "stop" and done.text == whole.text[: whole.text.index(stop)] == "".join(shown)
    assert done.tokens == whole.tokens[: len(done.tokens)] and len(done.tokens) < 30


def test_an_engine_goes_with_who_holds_it(tokenizer: Tokenizer) -> None:
    """Weights are large: they do not wait for the collector of circles."""
    engine = Engine.trace(make_model("dense", layers=1), tokenizer)
    engine.generate("def", max_tokens=2)
    held = weakref.ref(engine.runtime)
    gc.disable()
    try:
        del engine
        for _ in range(100):
            if held() is None:
                break
            time.sleep(0.01)  # until the thread that answered has ended
        assert held() is None
    finally:
        gc.enable()


def test_an_interrupted_text_is_left_and_the_next_one_comes(engine: Engine) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    wanted = engine.generate("def main", max_tokens=6).tokens
    with pytest.raises(KeyboardInterrupt):
        engine.generate("def main", max_tokens=40, on_text=interrupt)
    assert engine.generate("def main", max_tokens=6).tokens == wanted


def test_what_was_read_before_is_not_read_again(tokenizer: Tokenizer) -> None:
    """As in a conversation: each prompt is the one before, what was answered, and more."""
    model = make_model("dense")
    engine = Engine(TracedRuntime(model, GraphConfig(prefill_buckets=(4, 16)), page=4), tokenizer)
    first = engine.generate_tokens([7] * 10, max_tokens=8)
    assert first.cached_tokens == 0
    again = engine.generate_tokens([*[7] * 10, *first.tokens, 9, 9], max_tokens=4)
    assert again.cached_tokens == 16
    ids = np.array([*[7] * 10, *first.tokens, 9, 9, *again.tokens])
    expected = full_logits(model, ids)[:, : tokenizer.vocab_size].argmax(-1)
    assert expected[19:-1].tolist() == list(again.tokens)
