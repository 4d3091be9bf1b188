"""Windows as the harness cuts them, and llama.cpp's chunks by their definition."""

from pathlib import Path

import numpy as np
import pytest
from lm_eval import utils

from hsai.errors import InputError
from hsai.evaluate.perplexity import cut_chunks, cut_windows, read_text


@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 40, 43])
@pytest.mark.parametrize("stride", [1, 4, 10])
def test_windows_are_the_harness_ones(length: int, stride: int) -> None:
    tokens = list(range(100, 100 + length))
    pairs = cut_windows(tokens, prefix=[7], context=10, stride=stride)
    theirs = utils.get_rolling_token_windows(tokens, prefix_token=7, max_seq_len=10, context_len=11 - stride)
    expected = [utils.make_disjoint_window(window) for window in theirs]
    assert [(list(pair.context), list(pair.continuation)) for pair in pairs] == expected
    assert sum((list(pair.continuation) for pair in pairs), []) == tokens


def test_longer_prefixes() -> None:
    pairs = cut_windows(range(30), prefix=[7, 8], context=10, stride=10)
    assert pairs[0].context == (7, 8) and pairs[0].continuation == tuple(range(9))
    assert sum((list(pair.continuation) for pair in pairs), []) == list(range(30))


@pytest.mark.parametrize("prefix", [[], [5]])
def test_chunks_are_second_halves(prefix: list[int]) -> None:
    """By llama.cpp's loop: chunks of n tokens, the first replaced by the BOS token; logits n/2 .. n-2 count."""
    tokens = np.random.default_rng(0).integers(10, 99, 75).tolist()
    text, n = prefix + tokens, 16
    expected = []
    for chunk in range(len(text) // n):
        part = text[chunk * n : (chunk + 1) * n]
        part[: len(prefix)] = prefix
        expected += [(tuple(part[: i + 1]), part[i + 1]) for i in range(n // 2, n - 1)]
    found = []
    for pair in cut_chunks(tokens, prefix=prefix, context=n):
        for index, target in enumerate(pair.continuation):
            found.append((pair.context + pair.continuation[:index], target))
    assert found == expected


def test_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="the text has 15 tokens and does not fill one window of 16"):
        cut_chunks(range(15), prefix=[], context=16)
    with pytest.raises(InputError, match="--window 3 must be at least 4"):
        cut_chunks(range(15), prefix=[], context=3)
    for stride in (0, 9):
        with pytest.raises(InputError, match=f"--stride {stride} must be between 1 and the window's 8 tokens"):
            cut_windows(range(15), prefix=[0], context=8, stride=stride)
    with pytest.raises(InputError, match="--window 1 is too short: 2 tokens stand before a text"):
        cut_windows(range(15), prefix=[0, 1], context=1, stride=1)
    (tmp_path / "latin").write_bytes(b"na\xefve")
    with pytest.raises(InputError, match="latin is not text: byte 2 is not UTF-8"):
        read_text(tmp_path / "latin")
    with pytest.raises(InputError, match="cannot read"):
        read_text(tmp_path / "nothing")


def test_a_text_is_what_its_bytes_say(tmp_path: Path) -> None:
    """Line ends count for the tokens, and so for whoever compares with another program; a byte-order mark does not."""
    path = tmp_path / "text"
    path.write_bytes(b"one\r\ntwo\rthree\n")
    assert read_text(path) == "one\r\ntwo\rthree\n"
    path.write_bytes(b"\xef\xbb\xbfone \xef\xbb\xbf")
    assert read_text(path) == "one \ufeff"
    for nothing in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(nothing)
        with pytest.raises(InputError, match="text holds no text"):
            read_text(path)
