"""Files that we write, before llama.cpp: same logits, same greedy tokens; and read again, tensor for tensor."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

from hsai.errors import InputError
from hsai.formats import Int4
from hsai.formats.storage import named_arrays, named_weights, replace_weights
from hsai.interop.gguf import open_gguf_checkpoint, read_gguf
from hsai.interop.gguf_container import open_gguf
from hsai.interop.gguf_write import write_gguf
from hsai.models import TransformerConfig
from tests.interop.gguf_files import (
    CONFIGS,
    llama_logits,
    margin,
    open_llama,
    our_logits,
    random_model,
    train_tokenizer,
)

PROMPTS = ("the quick brown fox", "def main():\n", "42, 42; über 🦊 ")
NEW_TOKENS = 24


def greedy(logits_of: object, ids: list[int]) -> list[int]:
    ids = list(ids)
    for _ in range(NEW_TOKENS):
        ids.append(int(np.argmax(logits_of(ids)[-1])))  # type: ignore[operator]
    return ids


def gelu_of_ggml(x: jax.Array, approximate: bool) -> jax.Array:
    """ggml looks GELU up in a table of float16 (ggml_vec_gelu_f32)."""
    assert approximate
    return GELU(x.astype(jnp.float16).astype(jnp.float32), approximate=True).astype(jnp.float16).astype(jnp.float32)


GELU = jax.nn.gelu


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_agrees(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.nn, "gelu", gelu_of_ggml)
    tokenizer = train_tokenizer()
    model = random_model(CONFIGS[name])
    path = tmp_path / "model.gguf"
    assert write_gguf(path, model, tokenizer, dtype="f32").fallbacks == ()
    llama = open_llama(path)
    assert llama.n_vocab() == CONFIGS[name].vocab
    for prompt in PROMPTS:
        ids = llama.tokenize(prompt.encode(), add_bos=True, special=False)
        assert ids == [0, *tokenizer.backend.encode(prompt, add_special_tokens=False).ids]
        llama.reset()
        answer = list(zip(range(NEW_TOKENS), llama.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0), strict=False))
        tokens = ids + [token for _, token in answer]
        ours, theirs = our_logits(model, tokens), llama_logits(llama, tokens)
        # Where a number lies between two entries of a table, its neighbour may be looked up: a bit of float16.
        bound = 2e-4 if CONFIGS[name].activation == "silu" else 1e-3
        assert np.abs(ours - theirs).max() < bound
        assert np.median(np.abs(ours - theirs)) < 2e-5
        clear = margin(ours) > 2 * bound  # where this difference decides no token
        assert clear.mean() > 0.9
        assert np.array_equal(ours.argmax(axis=-1)[clear], theirs.argmax(axis=-1)[clear])
        assert list(ours.argmax(axis=-1)[len(ids) - 1 : -1]) == tokens[len(ids) :]


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q4_0"])
def test_llama_cpp_agrees_with_rounded_weights(dtype: str, tmp_path: Path) -> None:
    """Our model of what is in the file, in float32, against llama.cpp, which rounds activations for such weights."""
    tokenizer = train_tokenizer()
    path = tmp_path / "model.gguf"
    record = write_gguf(path, random_model(CONFIGS["llama"]), tokenizer, dtype=dtype)
    assert record.fallbacks == ()
    model = read_gguf(open_gguf_checkpoint(path))
    llama = open_llama(path)
    # Eight bits a block of 32 activations; float16 has ten behind the point, bfloat16 seven.
    bound = {"f16": 0.01, "bf16": 0.05, "q8_0": 0.08, "q4_0": 0.08}[dtype]
    decided = total = 0
    for prompt in PROMPTS:
        ids = greedy(lambda ids: our_logits(model, ids), llama.tokenize(prompt.encode(), special=False))
        ours, theirs = our_logits(model, ids), llama_logits(llama, ids)
        assert np.abs(ours - theirs).max() < bound
        clear = margin(ours) > 2 * bound
        assert np.array_equal(ours.argmax(axis=-1)[clear], theirs.argmax(axis=-1)[clear])
        decided, total = decided + int(clear.sum()), total + len(clear)
    assert decided > total / 2
