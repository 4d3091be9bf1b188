"""Streaming: whole characters only, and nothing lost or invented."""

import hypothesis
import hypothesis.strategies as st
import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.infer.streaming import TextStream


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The pieces of `ids`, one a token and the rest."""
    text = TextStream(tokenizer)
    return [text.push(token) for token in ids] + [text.finish()]


@hypothesis.given(text=st.text())
def test_text_streams_character_by_character(text: str, tokenizer: Tokenizer) -> None:
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@hypothesis.given(ids=st.lists(st.integers(0, 279)))
def test_any_tokens_stream_to_what_they_decode_to(ids: list[int], tokenizer: Tokenizer) -> None:
    """Bytes that are no UTF-8, cut characters and special tokens included."""
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("character", ["é", "数", "😁", "\ufffd"])
def test_character_is_held_until_it_is_whole(character: str, tokenizer: Tokenizer) -> None:
    pieces = stream(tokenizer, tokenizer.encode(f"{character}x"))
    assert "".join(pieces) == f"{character}x"
    assert set(pieces) <= {"", character, "x", f"{character}x"}


def test_cut_character_shows_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😁")  # the tokenizer has seen another face, so this one is made of several tokens
    assert len(ids) > 2
    assert "".join(stream(tokenizer, ids[:-1])) == "a\ufffd"
