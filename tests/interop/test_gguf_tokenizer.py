"""Tokenizers of GGUF files: every text has the ids that llama.cpp gives it, and what is written is read again."""

import random
import string
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gguf import TokenType
from tokenizers import pre_tokenizers

from hsai.errors import InputError
from hsai.interop.gguf_container import Metadata
from hsai.interop.gguf_splits import SPLITS
from hsai.interop.gguf_tokenizer import GgufTokenizer, read_tokenizer
from hsai.interop.gguf_vocabulary import describe_tokenizer
from tests.interop.gguf_files import write_file

TEXTS = [
    "", "a", " ", "  ", "\n", "\n\n", " \n \n", "Hello, world!", "I'm you're they'LL 'S don't 'tis", "1234567890 3.14",
    "x = 1;\n\n\n  y = 2\t\tz", "日本語テキスト", "🙂👩‍👩‍👧‍👦 e\u0301 é",
    "٣٤٥ ² ½ Ⅷ", "<|turn|>hi<|turn|>", "a\r\nb\r\n",
    "\u00a0\u2003x\u3000 y", "\x00\x01\x7f", "\u200b\u200d\ufeff", "   leading and trailing   ", "ก็ไทย मराठी",
    "\u2581a \u2581",
    "HelloWorld HTTPServer iPhone ÉTÉ été", "/path/to//file.txt!!??\n/", "$5+<=>^~|`x`", "<user> <user>x<user>",
]  # fmt: skip


def make_texts(count: int) -> list[str]:
    rng = random.Random(0)
    alphabet = [*string.ascii_letters, *"'''    \n\n\t\r0123456789.,!?-_/<|>$é日🙂\u0301\u00a0½Σ"]
    alphabet += ["'s", "'LL", "ing", "the ", "<|turn|>", "<user>"]
    return TEXTS + ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(count)]


def byte_level(pre: str) -> dict[str, Any]:
    """Every byte, some merges, two control tokens, one that the user defined, and unused ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["t h", "th e", "Ġ t", "Ġt h", "Ġth e", "i n", "in g", "Ġ Ġ", "ĠĠ ĠĠ", "1 2", "12 3", "' s", "l l", "' ll"]
    merges += ["Ċ Ċ", "H e", "He ll", "Hell o", "Ã ©", ". .", "0 0", "L L"]
    pieces = ["".join(merge.split(" ")) for merge in merges]
    tokens = ["<|end|>", "<|turn|>", *letters, *pieces, "<user>", "[PAD0]", "[PAD1]"]
    types = [TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(letters) + len(pieces))
    types += [TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.UNUSED]
    return _key(
        {
            "model": "gpt2",
            "pre": pre,
            "tokens": tokens,
            "token_type": [int(kind) for kind in types],
            "merges": merges,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "eot_token_id": 1,
            "add_bos_token": True,
        }
    )


def sentencepiece(prefix: bool) -> dict[str, Any]:
    """Pieces with scores, bytes for the rest."""
    pieces = ["\u2581", *string.ascii_letters, *string.digits, *".,!?'-", "é", "日", "\n"]
    pieces += [
        "\u2581t",
        "he",
        "\u2581the",
        "in",
        "ing",
        "th",
        "the",
        "\u2581\u2581",
        "\u2581\u2581\u2581\u2581",
        "ll",
        "Hello",
    ]
    pieces += ["He", "lo", "Hel", "llo", "\u2581H", "\u2581Hello", "12", "00", "\u2581a", "is"]
    special = ["<unk>", "<s>", "</s>", "<|turn|>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<user>"]
    scores = [0.0] * 260 + [-float(rank) for rank in range(len(pieces))] + [0.0]
    kinds = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 3, *[TokenType.BYTE] * 256]
    kinds += [*[TokenType.NORMAL] * len(pieces), TokenType.USER_DEFINED]
    return _key(
        {
            "model": "llama",
            "pre": "default",
            "tokens": tokens,
            "scores": scores,
            "token_type": [int(kind) for kind in kinds],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "eot_token_id": 3,
            "add_space_prefix": prefix,
        }
    )


def _key(values: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def read(values: dict[str, Any]) -> GgufTokenizer:
    """As from a file, whose lists of numbers are arrays."""
    arrays = {k: np.array(v) if isinstance(v, list) and not isinstance(v[0], str) else v for k, v in values.items()}
    return read_tokenizer(Metadata(Path("file.gguf"), arrays), len(values["tokenizer.ggml.tokens"]))


def open_vocabulary(path: Path, values: dict[str, Any]) -> llama_cpp.Llama:
    """llama.cpp with a tokenizer and no model."""
    sizes = {"block_count": 1, "context_length": 512, "embedding_length": 32, "feed_forward_length": 32}
    sizes |= {"attention.head_count": 1, "attention.layer_norm_rms_epsilon": 1e-5}
    metadata = {f"llama.{key}": value for key, value in sizes.items()} | values
    write_file(path, metadata, {"token_embd.weight": (np.zeros((4, 32), np.float32), None)})
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


VOCABULARIES = {pre: byte_level(pre) for pre in dict.fromkeys(SPLITS)} | {
    "sentencepiece": sentencepiece(True),
    "sentencepiece without prefix": sentencepiece(False),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    """As read, and once more as written and read again."""
    values = VOCABULARIES[name]
    llama = open_vocabulary(tmp_path / "file.gguf", values)
    found = read(values)
    written = describe_tokenizer(found, len(values["tokenizer.ggml.tokens"]))
    assert (found.bos, found.eos) == (found.backend.id_to_token(llama.token_bos()), found.eos)
    again = open_vocabulary(tmp_path / "again.gguf", written)
    assert read(written).backend.to_str() == found.backend.to_str()
    for special in (False, True):
        found.backend.encode_special_tokens = not special
        for text in make_texts(400):
            ids = found.backend.encode(text, add_special_tokens=False).ids
            for judge in (llama, again):
                assert ids == judge.tokenize(text.encode(), add_bos=False, special=special), (text, special)
    assert found.backend.encode("a").ids == llama.tokenize(b"a", add_bos=True)
    assert found.stops == (found.eos, "<|turn|>") and found.add_bos


@pytest.mark.parametrize("values", [byte_level("gpt-2"), sentencepiece(True)], ids=["bytes", "sentencepiece"])
def test_every_byte_survives(values: dict[str, Any]) -> None:
    """Behind a token of the user's, SentencePiece puts a space before the text; such texts are left out."""
    spaces = values["tokenizer.ggml.model"] == "llama"
    backend = read(values).backend
    backend.encode_special_tokens = True
    for text in make_texts(100):
        if not spaces or "<user>" not in text:
            ids = backend.encode(text, add_special_tokens=False).ids
            wanted = text.replace("\u2581", " ") if spaces else text
            assert backend.decode(ids, skip_special_tokens=False) == wanted


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"model": "bert"}, "the tokenizer 'bert' is not read; those that are: gpt2, llama"),
        ({"pre": "viking"}, "the pre-tokenizer 'viking' is not read; those that are: default, gpt-2"),
        ({"merges": ["t h", "xy"]}, "the merge 'xy' is no pair"),
        ({"merges": ["t h", "q q"]}, "a merge makes or takes 'qq', which is no token"),
        ({"merges": 3}, "tokenizer.ggml.merges is 3, and should be of type list"),
        ({"token_type": [1, 2]}, r"token_type has 2 entries \(int64\) for"),
        ({"eos_token_id": 9999}, "eos_token_id=9999 is none of its"),
        ({"tokens": ["a", "b", "a"]}, "the token 'a' stands there twice"),
        ({"tokens": [str(i) for i in range(400)]}, "its tokenizer has 400 tokens, and its embedding"),
        ({"add_bos_token": 1}, "add_bos_token is 1, and should be of type bool"),
    ],
)
def test_faults_are_refused(change: dict[str, Any], refusal: str) -> None:
    values = byte_level("smollm")
    vocab = len(values["tokenizer.ggml.tokens"])
    values |= _key(change)
    arrays = {k: np.array(v) if isinstance(v, list) and not isinstance(v[0], str) else v for k, v in values.items()}
    with pytest.raises(InputError, match=refusal) as caught:
        read_tokenizer(Metadata(Path("file.gguf"), arrays), vocab)
    assert "\n" not in str(caught.value)


def test_scores_that_are_no_numbers_are_refused() -> None:
    values = sentencepiece(True)
    for scores in ([0.0, 1.0], [float("nan")] * len(values["tokenizer.ggml.tokens"])):
        with pytest.raises(InputError, match="scores are not a finite number for each of its tokens"):
            read(values | {"tokenizer.ggml.scores": scores})
