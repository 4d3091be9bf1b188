"""The tokenizer: nothing is lost, bytes are counted, special tokens never come from text."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from hsai.data.tokenizer import END_OF_TEXT, Tokenizer
from hsai.errors import InputError

TEXTS = [f"def prune(weights, scale={i}):\n    return weights * scale  # être\n" for i in range(50)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


@settings(max_examples=200)
@given(text=st.text() | st.lists(st.sampled_from([*TEXTS, END_OF_TEXT, " ", "\n", "é"])).map("".join))
def test_text_survives_and_bytes_add_up(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())
    assert tokenizer.eot not in ids


def test_merges_are_used(tokenizer: Tokenizer):
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_shape_of_the_vocabulary(tokenizer: Tokenizer):
    assert tokenizer.vocab_size == 300 and tokenizer.eot == 0
    assert tokenizer.token_bytes.shape == (300,) and tokenizer.token_bytes.dtype == "int32"
    assert tokenizer.token_bytes[0] == 0 and (tokenizer.token_bytes[1:] > 0).all()
    assert tokenizer.decode([0, *tokenizer.encode("a"), 0]) == "a"


def test_a_batch_is_what_single_texts_are(tokenizer: Tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_the_same_texts_give_the_same_file(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "a.json")
    Tokenizer.train(iter(TEXTS), 300).save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_loading_gives_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    text = f"prune{END_OF_TEXT}être"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.token_bytes == tokenizer.token_bytes).all() and loaded.eot == tokenizer.eot


@pytest.mark.parametrize("bad", [-1, 300, 10**12])
def test_an_id_out_of_range_is_named(tokenizer: Tokenizer, bad: int):
    with pytest.raises(InputError, match=f"token id {bad} is out of range; valid are 0 to 299"):
        tokenizer.decode([1, bad])


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer):
    with pytest.raises(InputError, match="at 1 of the text"):
        tokenizer.encode("a\ud800")


def test_vocabularies_that_cannot_be():
    with pytest.raises(InputError, match="vocab_size=256 must be at least 257"):
        Tokenizer.train(TEXTS, 256)
    with pytest.raises(InputError, match="vocab_size=5000 cannot be filled: this text yields 259 tokens"):
        Tokenizer.train(["aaaa"], 5000)


def test_files_that_are_no_tokenizer(tmp_path: Path):
    with pytest.raises(InputError, match="none.json"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"version": ')
    with pytest.raises(InputError, match="cut.json is not a tokenizer.json"):
        Tokenizer.load(tmp_path / "cut.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    with pytest.raises(InputError, match="bytes.json"):
        Tokenizer.load(tmp_path / "bytes.json")


def test_tokenizers_of_another_kind_are_refused(tmp_path: Path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({END_OF_TEXT: 0, "où ça": 1}, unk_token=END_OF_TEXT))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(InputError, match="words.json: token 'où ça' is not made of bytes"):
        Tokenizer.load(tmp_path / "words.json")
    with pytest.raises(InputError, match="no token '</s>'"):
        Tokenizer.load(tmp_path / "words.json", end_of_text="</s>")
