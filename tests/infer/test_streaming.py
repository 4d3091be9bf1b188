"""Streaming: whole characters only, and nothing lost or invented."""

import hypothesis
import hypothesis.strategies as st
import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.infer.streaming import StopFinder, TextStream


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


def cut(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """The pieces joined, up to a stop string."""
    finder = StopFinder(stops)
    text = ""
    for piece in pieces:
        text += finder.push(piece)
        if finder.found:
            break
    return text + finder.finish(), finder.found


@hypothesis.given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_text_is_cut_before_its_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    """Whatever borders there are between the pieces: where the first that is complete begins."""
    text = "".join(pieces)
    found, stopped = cut(pieces, stops)
    assert stopped == any(stop in text for stop in stops)
    if not stopped:
        assert found == text
    else:
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        assert text.startswith(found) and any(text.startswith(stop, len(found)) for stop in stops)
        assert len(found) <= min(ends) and not any(stop in found for stop in stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    finder = StopFinder(["\n\nHuman:", "END"])
    pieces = [finder.push(piece) for piece in ("a\n", "b\n\nHu", "go E", "N", "E", "ND of")]
    assert pieces == ["a", "\nb", "\n\nHugo ", "", "EN", ""] and finder.found and finder.finish() == ""
