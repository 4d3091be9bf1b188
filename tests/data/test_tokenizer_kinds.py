"""Tokenizers of other models: bytes add up, text comes back, and what stands before and after it is as in theirs."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.infer.streaming import TextStream
from tests.data.vocabularies import (
    CONFIGS,
    KINDS,
    LLAMA3,
    QWEN,
    STOPS,
    TEXTS,
    byte_level,
    sentencepiece,
    write_repository,
)
from tests.needs import bring

os.environ.setdefault("HF_HUB_OFFLINE", "1")
BACKENDS = {kind: make() for kind, make in KINDS.items()}
WRAPPED = {
    kind: Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()), end_of_text=CONFIGS[kind]["eos_token"])
    for kind, backend in BACKENDS.items()
}
PARTS = [
    *TEXTS,
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "<|eot_id|>",
    "<|im_end|>",
    " ",
    "  ",
    "\n",
    "é",
    "e\u0301",
    "数",
    "\x00",
]
# U+2581 is SentencePiece's own spelling of a space: see hsai/data/pieces.py.
ANY_TEXT = (st.text() | st.lists(st.sampled_from(PARTS)).map("".join)).filter(lambda text: "▁" not in text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_bytes_add_up_and_text_comes_back(kind: str, text: str) -> None:
    tokenizer = WRAPPED[kind]
    ids = tokenizer.encode(text)
    read = unicodedata.normalize("NFC", text) if kind == "qwen" else text
    # llama2 puts a space before any text but none; mistral only where there is none yet.
    space = bool(text) and (kind == "llama2" or (kind == "mistral" and not text.startswith(" ")))
    assert int(tokenizer.token_bytes[ids].sum()) == len(read.encode()) + space
    assert tokenizer.decode_bytes(ids).decode() == " " * space + read
    assert tokenizer.decode(ids) == (read.removeprefix(" ") if kind == "mistral" and not space else read)
    specials = {BACKENDS[kind].token_to_id(token) for token in ["<s>", "</s>", "<unk>", *LLAMA3, *QWEN]}
    assert not specials & set(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=ANY_TEXT)
def test_tokens_and_text_are_those_of_the_library(kind: str, text: str) -> None:
    """Its own flags, on another object: text that spells no special token has the same ids with and without them."""
    tokenizer, backend = WRAPPED[kind], BACKENDS[kind]
    special = [token for token in ["<s>", "</s>", "<unk>", *LLAMA3, *QWEN] if token in text]
    ids = backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, special=True) == ids
    if not special:
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == backend.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(text=ANY_TEXT, before=ANY_TEXT, behind=ANY_TEXT)
def test_what_is_marked_is_text(kind: str, text: str, before: str, behind: str) -> None:
    tokenizer = WRAPPED[kind]
    mark, end = "\ue00017\ue001", CONFIGS[kind]["eos_token"]
    whole = before + mark + behind
    ids = tokenizer.encode_marked(whole, {mark: text})
    special = [token for token in ids if tokenizer.token_bytes[token] == 0]
    assert special == [token for token in tokenizer.encode(whole, special=True) if tokenizer.token_bytes[token] == 0]
    if not special:
        assert ids == tokenizer.encode(before + text + behind)
    assert tokenizer.encode_marked(before, {mark: text}) == tokenizer.encode(before, special=True)
    found = tokenizer.encode_marked(f"{end}{mark}{end}", {mark: text})
    assert found == [tokenizer.eot, *tokenizer.encode(text), tokenizer.eot]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_tokens_stream_to_what_they_stand_for(kind: str, data: st.DataObject) -> None:
    tokenizer = WRAPPED[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = TextStream(tokenizer)
    text = "".join([*(stream.push(token) for token in ids), stream.finish()])
    assert text == tokenizer.decode_bytes(ids).decode(errors="replace")
    assert tokenizer.decode(ids) == (text.removeprefix(" ") if tokenizer.adds_space else text)


def test_a_continuation_keeps_the_space_of_its_first_word() -> None:
    tokenizer = WRAPPED["llama2"]
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("Paris is the capital")
    assert "".join(map(stream.push, ids)) == " Paris is the capital"
    assert tokenizer.decode(ids) == "Paris is the capital"


def test_byte_tokens_and_special_tokens() -> None:
    tokenizer = WRAPPED["gemma"]
    backend = BACKENDS["gemma"]
    assert tokenizer.token_bytes[backend.token_to_id("<0xE6>")] == 1
    assert tokenizer.decode_bytes([backend.token_to_id("<0xE6>")]) == b"\xe6"
    assert tokenizer.token_bytes[backend.token_to_id("<end_of_turn>")] == 0
    assert "▁▁" in backend.get_vocab(with_added_tokens=False)
    assert tokenizer.decode_bytes([backend.token_to_id("▁▁")]) == b"  "
    spelled = "<start_of_turn>user"
    assert tokenizer.encode(spelled, special=True)[0] == backend.token_to_id("<start_of_turn>")
    assert backend.token_to_id("<start_of_turn>") not in tokenizer.encode(spelled)


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_and_ids_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    transformers = bring("transformers")
    write_repository(kind, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_huggingface(tmp_path)
    for text in [*TEXTS, " led by a space", "x"]:
        assert [*ours.prefix, *ours.encode(text)] == theirs(text).input_ids
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)
    assert ours.eot == theirs.eos_token_id
    assert len(ours.prefix) == (0 if kind == "qwen" else 1)


def test_stops_are_those_of_the_generation_config(tmp_path: Path) -> None:
    backend = write_repository("llama3", tmp_path)
    tokenizer = Tokenizer.from_huggingface(tmp_path)
    assert tokenizer.stops == {backend.token_to_id(token) for token in STOPS["llama3"]}
    assert tokenizer.name(tokenizer.eot) == "<|end_of_text|>"
    (tmp_path / "generation_config.json").unlink()
    assert Tokenizer.from_huggingface(tmp_path).stops == {tokenizer.eot}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": backend.token_to_id("<|eot_id|>")}))
    assert Tokenizer.from_huggingface(tmp_path).stops == {tokenizer.eot, backend.token_to_id("<|eot_id|>")}
    (tmp_path / "tokenizer_config.json").unlink()
    bare = Tokenizer.from_huggingface(tmp_path)  # the post-processor tells of the prefix, config.json of the end
    assert bare.name(bare.eot) == "<|eot_id|>" and [bare.name(token) for token in bare.prefix] == ["<|begin_of_text|>"]
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|eom_id|>"}}))
    assert Tokenizer.from_huggingface(tmp_path).eot == backend.token_to_id("<|eom_id|>")


def test_special_tokens_beyond_the_embedding_are_left_out(tmp_path: Path) -> None:
    backend = write_repository("gemma", tmp_path)
    size = backend.get_vocab_size()
    backend.add_special_tokens(["<image_soft_token>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_huggingface(tmp_path).vocab_size == size + 1
    cut = Tokenizer.from_huggingface(tmp_path, vocab=size)
    assert cut.vocab_size == size and cut.encode("hello") == Tokenizer.from_huggingface(tmp_path).encode("hello")
    # Ordinary tokens stay, and the model's embedding refuses them.
    assert Tokenizer.from_huggingface(tmp_path, vocab=40).vocab_size >= size - 5


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"eos_token": "</end>"}, "eos_token '</end>' of tokenizer_config.json is not in the"),
        ("tokenizer_config.json", {}, None),
        ("generation_config.json", {"eos_token_id": 100000}, "generation_config.json: eos_token_id 100000 is not in"),
        ("generation_config.json", {"eos_token_id": "x"}, "generation_config.json: eos_token_id 'x' is neither"),
        ("generation_config.json", [], "generation_config.json holds list, not an object"),
        ("tokenizer.json", {"version": 1}, "tokenizer.json is not a tokenizer.json"),
    ],
)
def test_repositories_that_cannot_be(file: str, content: object, message: str | None, tmp_path: Path) -> None:
    write_repository("mistral", tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message or "no end-of-text token") as caught:
        Tokenizer.from_huggingface(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("normalizer", [normalizers.Lowercase(), normalizers.NFKC(), normalizers.Replace("a", "b")])
def test_normalizers_that_change_the_text_are_refused(normalizer: normalizers.Normalizer) -> None:
    backend = byte_level(QWEN)
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizer])
    with pytest.raises(InputError, match=f"normalizer {type(normalizer).__name__} changes the text"):
        Tokenizer(backend)


def test_fallback_without_all_bytes_is_refused() -> None:
    fields = json.loads(sentencepiece("gemma").to_str())
    fields["model"]["vocab"]["<0xFFF>"] = fields["model"]["vocab"].pop("<0xFE>")
    with pytest.raises(InputError, match="has no token '<0xFE>', so it does not cover every text"):
        Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(fields)), end_of_text="</s>")


def test_tokens_that_are_not_there_are_named() -> None:
    with pytest.raises(InputError, match="no token '<none>'; name its prefix or stop token"):
        Tokenizer(byte_level(QWEN), prefix=("<none>",))
    with pytest.raises(InputError, match="no token '<none>'; name its prefix or stop token"):
        Tokenizer(byte_level(QWEN), stops=("<none>",))


def test_truncation_and_padding_that_a_file_asks_for_are_undone() -> None:
    backend = byte_level(QWEN)
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    assert len(Tokenizer(backend).encode("hello world, hello world")) > 2
    assert len(Tokenizer(backend).encode("x")) == 1
