"""Files that we write, before llama.cpp: same logits, same greedy tokens; and read again, tensor for tensor."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGUFReader, quants

from hsai.errors import InputError
from hsai.formats import Int4Config, Int4OffsetConfig
from hsai.formats.storage import named_arrays, named_weights, replace_weights
from hsai.interop.assemble import assemble
from hsai.interop.gguf import open_gguf_checkpoint
from hsai.interop.gguf_container import open_gguf
from hsai.interop.gguf_write import write_gguf
from hsai.models import MoEConfig
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
        # Where a number lies between two entries of a table, its neighbour may be looked up: a bit of float16. With no
        # table imitated, all such bits together make 2.3e-3; how many fall the other way depends on the order of sums.
        bound = 2e-4 if CONFIGS[name].activation == "silu" else 2.3e-3
        assert np.abs(ours - theirs).max() < bound
        assert np.median(np.abs(ours - theirs)) < 2e-5
        clear = margin(ours) > 2 * bound  # where this difference decides no token
        assert clear.mean() > 0.9
        assert np.array_equal(ours.argmax(axis=-1)[clear], theirs.argmax(axis=-1)[clear])
        assert list(ours.argmax(axis=-1)[len(ids) - 1 : -1]) == tokens[len(ids) :]


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_llama_cpp_agrees_with_rounded_weights(dtype: str, tmp_path: Path) -> None:
    """Our model of what is in the file, in float32, against llama.cpp, which rounds activations for such weights."""
    tokenizer = train_tokenizer()
    path = tmp_path / "model.gguf"
    record = write_gguf(path, random_model(CONFIGS["llama"]), tokenizer, dtype=dtype)
    assert record.fallbacks == ()
    model = assemble(open_gguf_checkpoint(path))
    llama = open_llama(path)
    # Eight bits a block of 32 activations, whose sum is a float16 where minima want it; float16 has ten behind the
    # point, bfloat16 seven.
    bound = {"f16": 0.01, "bf16": 0.15, "q8_0": 0.15, "q4_0": 0.15, "q4_1": 0.2}[dtype]
    decided = total = 0
    for prompt in PROMPTS:
        ids = greedy(lambda ids: our_logits(model, ids), llama.tokenize(prompt.encode(), special=False))
        ours, theirs = our_logits(model, ids), llama_logits(llama, ids)
        assert np.abs(ours - theirs).max() < bound
        clear = margin(ours) > 2 * bound
        assert np.array_equal(ours.argmax(axis=-1)[clear], theirs.argmax(axis=-1)[clear])
        decided, total = decided + int(clear.sum()), total + len(clear)
    assert decided > total / 3


@pytest.mark.parametrize("name", CONFIGS)
def test_read_again_bit_for_bit(name: str, tmp_path: Path) -> None:
    """In and out twice: the second file is the first one, byte for byte, and the model the one that was written."""
    tokenizer, model = train_tokenizer(), random_model(CONFIGS[name])
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    write_gguf(first, model, tokenizer, dtype="f32")
    checkpoint = open_gguf_checkpoint(first)
    read = assemble(checkpoint)
    wanted, found = named_arrays(model), named_arrays(read)
    assert wanted.keys() == found.keys()
    for key, array in wanted.items():
        if CONFIGS[name].norm_plus_one and key.endswith("gain"):  # a file has 1 + gain, which float32 rounds
            assert np.allclose(array, found[key], rtol=0, atol=2**-23)
        else:
            assert np.array_equal(array, found[key]), key
    settled = dataclasses.replace(CONFIGS[name], query_scalar=checkpoint.config.query_scalar)
    assert checkpoint.config == settled
    write_gguf(second, read, checkpoint.tokenizer, dtype="f32")
    assert first.read_bytes() == second.read_bytes()


def test_gains_of_a_bfloat16_file_are_not_rounded(tmp_path: Path) -> None:
    """They are float32 there: weights are held in bfloat16 where all of them fit it, or else in float32."""
    model = random_model(CONFIGS["qwen2"])
    rounded = {n: p.get_value().astype(jnp.bfloat16).astype(jnp.float32) for n, p in named_weights(model).items()}
    for name, given, kind in (("odd", model, jnp.float32), ("even", replace_weights(model, rounded), jnp.bfloat16)):
        write_gguf(tmp_path / name, given, train_tokenizer(), dtype="bf16")
        checkpoint = open_gguf_checkpoint(tmp_path / name)
        found = named_arrays(assemble(checkpoint))
        assert checkpoint.dtype == kind == found["final_norm.gain"].dtype
        assert np.array_equal(found["final_norm.gain"], named_arrays(given)["final_norm.gain"])
        assert np.array_equal(found["layers.attention.q_bias"], named_arrays(given)["layers.attention.q_bias"])


def test_numbers_and_header_are_those_that_gguf_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, random_model(CONFIGS["llama3"]), train_tokenizer(), dtype="q4_0", about={"name": "tiny"})
    theirs, ours = GGUFReader(path), open_gguf(path)
    assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        wanted = quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        assert np.array_equal(ours.read(tensor.name), wanted), tensor.name
    kinds = {tensor.name: tensor.tensor_type.name for tensor in theirs.tensors}
    assert kinds["output.weight"] == "Q8_0" and kinds["token_embd.weight"] == kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["blk.0.attn_norm.weight"] == kinds["rope_freqs.weight"] == "F32"
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            found = ours.metadata[key]
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == field.contents(), key


def test_rows_that_are_no_whole_blocks_are_float16(tmp_path: Path) -> None:
    model = random_model(dataclasses.replace(CONFIGS["llama"], mlp=80))
    record = write_gguf(tmp_path / "model.gguf", model, train_tokenizer(), dtype="q8_0")
    assert record.fallbacks == tuple(f"blk.{layer}.ffn_down.weight" for layer in range(3))
    assert open_gguf(tmp_path / "model.gguf").tensors["blk.0.ffn_down.weight"].type.name == "F16"
    assert np.isfinite(llama_logits(open_llama(tmp_path / "model.gguf"), [0, 1, 2])).all()


def test_packed_weights_need_a_word(tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama"])
    values = {name: param.get_value() for name, param in named_weights(model).items()}
    packed = Int4Config(group=32).pack(values["layers.mlp.down"])
    model = replace_weights(model, values | {"layers.mlp.down": packed})
    path = tmp_path / "model.gguf"
    with pytest.raises(InputError, match="layers.mlp.down is packed as int4"):
        write_gguf(path, model, train_tokenizer())
    assert list(tmp_path.iterdir()) == []
    write_gguf(path, model, train_tokenizer(), dtype="f32", dequantize=True)
    assert np.array_equal(open_gguf(path).read("blk.1.ffn_down.weight"), np.asarray(packed.dense())[1].T)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3"])
def test_int4_offset_is_written_as_it_is(name: str, tmp_path: Path) -> None:
    """As Q4_1: what both readers find are the packed numbers, bit for bit, though they leave out the outer codes; with
    queries and keys in the order of the file, experts, and a tied table."""
    model = random_model(CONFIGS[name])
    values = {n: p.get_value() for n, p in named_weights(model).items() if not n.endswith(("gain", "router"))}
    packed = {}
    for n, value in values.items():
        groups = value.reshape(*value.shape[:-2], -1, 32, value.shape[-1])
        smallest, scale = jnp.min(groups, -2), (jnp.max(groups, -2) - jnp.min(groups, -2)) / 13
        packed[n] = Int4OffsetConfig().pack(value, jnp.concatenate([scale, smallest - scale], axis=-1))
    path = tmp_path / "model.gguf"
    write_gguf(path, replace_weights(model, packed), train_tokenizer(), dtype="q4_1")
    read = assemble(open_gguf_checkpoint(path), dtype=jnp.float32)
    for n, value in packed.items():
        np.testing.assert_array_equal(named_arrays(read)[n], value.dense(), err_msg=n)
    kinds = set()
    ours = open_gguf(path)
    for tensor in GGUFReader(path).tensors:
        wanted = quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        np.testing.assert_array_equal(ours.read(tensor.name), wanted)
        kinds.add(tensor.tensor_type.name)
    assert kinds == {"Q4_1", "F32"}
    logits, theirs = our_logits(read, [0, 1, 2]), llama_logits(open_llama(path), [0, 1, 2])
    assert np.sqrt(np.mean((logits - theirs) ** 2)) < 0.02 * np.abs(logits).max()  # activations are rounded to 8 bits


def test_int4_offset_in_other_groups_needs_a_word(tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama"])
    name = "layers.attention.q"
    for group, dtype in ((64, "q4_1"), (32, "q4_0")):
        packed = Int4OffsetConfig(group=group).pack(named_weights(model)[name].get_value())
        with pytest.raises(InputError, match=f"{name} is packed as int4_offset"):
            write_gguf(tmp_path / "model.gguf", replace_weights(model, {name: packed}), train_tokenizer(), dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_numbers_beyond_the_type_are_refused(tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama"])
    values = {name: param.get_value() for name, param in named_weights(model).items()}
    values["layers.attention.v"] = values["layers.attention.v"].at[1, 2, 3].set(1e5)
    large = replace_weights(model, values)
    with pytest.raises(InputError, match=r"'blk.1.attn_v.weight' holds 100000, which f16 cannot say; take bf16 or f32"):
        write_gguf(tmp_path / "model.gguf", large, train_tokenizer(), dtype="f16")
    assert list(tmp_path.iterdir()) == []
    write_gguf(tmp_path / "model.gguf", large, train_tokenizer(), dtype="bf16")
    with pytest.raises(InputError, match="no GGUF type 'q4_k'; those that are written are f32, f16"):
        write_gguf(tmp_path / "model.gguf", large, train_tokenizer(), dtype="q4_k")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"activation": "gelu"}, "llama cannot say model.activation=gelu: it has silu"),
        ({"qkv_bias": True, "qk_norm": True}, "qwen2 cannot say model.qk_norm=True"),
        ({"qk_norm": True, "sliding_window": 8}, "qwen3 cannot say model.sliding_window=8: it has None"),
        ({"query_scalar": 8}, "llama cannot say model.query_scalar=8: it has 16"),
        ({"moe": MoEConfig(experts=4, active=2, normalize=False)}, "llama cannot say model.moe="),
        ({"sliding_window": 8, "global_every": 2}, "llama cannot say model.global_every=2"),
        ({"qk_norm": True, "rope": CONFIGS["llama3"].rope}, "factors for its rope frequencies, which do not fit qwen3"),
    ],
)
def test_models_that_llama_cpp_has_not_are_refused(fields: dict[str, Any], refusal: str, tmp_path: Path) -> None:
    model = random_model(dataclasses.replace(CONFIGS["llama"], **fields))
    with pytest.raises(InputError, match=refusal):
        write_gguf(tmp_path / "model.gguf", model, train_tokenizer())
    assert list(tmp_path.iterdir()) == []
