"""Metadata of files by others: what is read of them, and what is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hsai.errors import InputError
from hsai.interop.assemble import assemble
from hsai.interop.gguf import open_gguf_checkpoint
from hsai.interop.gguf_config import read_config
from hsai.interop.gguf_container import Metadata, open_gguf
from hsai.interop.gguf_rope import fit_scaling, rope_factors, same_rotation
from hsai.interop.gguf_write import write_gguf
from hsai.models import RopeConfig, RopeScaling, TransformerConfig
from tests.interop.gguf_files import CONFIGS, random_model, train_tokenizer, write_file

# What llama.cpp's converter writes of Gemma 3 4B, and of Mistral 7B 0.1.
GEMMA = {
    "general.architecture": "gemma3",
    "gemma3.context_length": 131072,
    "gemma3.embedding_length": 2560,
    "gemma3.block_count": 34,
    "gemma3.feed_forward_length": 10240,
    "gemma3.attention.head_count": 8,
    "gemma3.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
    "gemma3.attention.key_length": 256,
    "gemma3.attention.value_length": 256,
    "gemma3.rope.freq_base": 1e6,
    "gemma3.attention.sliding_window": 1024,
    "gemma3.attention.head_count_kv": 4,
    "gemma3.rope.scaling.type": "linear",
    "gemma3.rope.scaling.factor": 8.0,
}
MISTRAL = {
    "general.architecture": "llama",
    "llama.context_length": 32768,
    "llama.embedding_length": 4096,
    "llama.block_count": 32,
    "llama.feed_forward_length": 14336,
    "llama.rope.dimension_count": 128,
    "llama.attention.head_count": np.full(32, 32, np.int32),
    "llama.attention.head_count_kv": 8,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.rope.freq_base": 10000.0,
    "llama.attention.sliding_window": 4096,
}


def read(values: dict[str, Any], **options: Any) -> TransformerConfig:
    return read_config(Metadata(Path("file.gguf"), values), **({"vocab": 32000, "tied": False} | options))[1]


def test_gemma() -> None:
    assert read(GEMMA, vocab=262144, tied=True) == TransformerConfig(
        vocab=262144, embed=2560, layers=34, heads=8, kv_heads=4, head_dim=256, mlp=10240, max_length=131072,
        activation="gelu", norm_eps=1e-6, norm_plus_one=True, post_norm=True, qk_norm=True, scale_embeddings=True,
        query_scalar=256, sliding_window=1024, global_every=6, tie_embeddings=True, dtype="float32",
        rope=RopeConfig(theta=1e6, scaling=RopeScaling(kind="linear", factor=8.0)), local_rope=RopeConfig(theta=1e4),
    )  # fmt: skip
    largest = {"gemma3.block_count": 62, "gemma3.embedding_length": 5376, "gemma3.attention.head_count": 32}
    assert read(GEMMA | largest).query_scalar == 168


def test_mistral() -> None:
    assert read(MISTRAL) == TransformerConfig(
        vocab=32000, embed=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14336, max_length=32768,
        sliding_window=4096, tie_embeddings=False, dtype="float32",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"general.architecture": "phi3"}, "the architecture 'phi3' is not read; those that are: llama, qwen2"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'; those that are read are none"),
        ({"llama.block_count": "many"}, "llama.block_count is 'many', and should be of type int"),
        ({"llama.block_count": 0}, "model.layers=0 must be at least 1"),
        ({"llama.vocab_size": 7}, "llama.vocab_size=7, and the embedding has 32000 rows"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count=0 is impossible"),
        ({"llama.attention.head_count_kv": 5}, "model.heads=32 must be a multiple of model.kv_heads=5"),
        ({"llama.attention.head_count_kv": np.array([8, 4])}, r"llama.attention.head_count_kv is \[8, 4\]"),
        ({"llama.attention.value_length": 64}, "llama.attention.value_length=64 differs from the keys' width, 128"),
        ({"llama.rope.dimension_count": 64}, "llama.rope.dimension_count=64 differs"),
        ({"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping=30.0 is not known"),
        ({"llama.logit_scale": 0.1}, "llama.logit_scale=0.1 is not known; it may change what the model computes"),
        ({"llama.expert_count": 8}, "its metadata lacks llama.expert_used_count"),
        ({"llama.expert_count": 2, "llama.expert_used_count": 3}, "moe.active=3 must be between 1 and moe.experts=2"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan, and should be"),
    ],
)
def test_refusals(change: dict[str, Any], refusal: str) -> None:
    with pytest.raises(InputError, match=refusal) as caught:
        read(MISTRAL | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("head_dim", [64, 128, 16])
@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (8.0, 64)])
def test_llama3_scaling_is_found_again(head_dim: int, factor: float, original: int) -> None:
    scaling = RopeScaling(kind="llama3", factor=factor, high_freq_factor=4.0, original_length=original)
    config = RopeConfig(theta=500_000.0, scaling=scaling)
    found = fit_scaling(rope_factors(config, head_dim), config.theta, head_dim, "file")
    assert same_rotation(config, RopeConfig(theta=config.theta, scaling=found), head_dim)
    if head_dim >= 64:  # several frequencies are blended, which leaves no choice
        assert found == scaling


@pytest.mark.parametrize(
    "factors", [np.full(31, 2.0), np.linspace(1, 9, 32), np.r_[np.ones(31), np.nan], np.linspace(0.5, 1, 32)]
)
def test_other_factors_are_refused(factors: np.ndarray) -> None:
    with pytest.raises(InputError, match="its rope factors are not those of Llama 3's scaling"):
        fit_scaling(factors.astype(np.float32), 500_000.0, 64, "file")
    assert fit_scaling(np.ones(32, np.float32), 500_000.0, 64, "file") is None


def damage(path: Path, tensor: str, value: float) -> None:
    """Overwrites the first number of a float32 tensor."""
    record = open_gguf_checkpoint(path).file.tensors[tensor]
    with open(path, "r+b") as file:
        file.seek(record.offset)
        file.write(np.float32(value).tobytes())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tensors_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, random_model(CONFIGS["llama"]), train_tokenizer(), dtype="f32")
    damage(path, "blk.1.ffn_up.weight", value)
    with pytest.raises(InputError, match="'blk.1.ffn_up.weight' holds 1 values that are NaN or infinite"):
        assemble(open_gguf_checkpoint(path))


def test_tensors_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    """One more than it has, and those of a layer that the metadata do not count; none is missing."""
    path, larger = tmp_path / "model.gguf", tmp_path / "larger.gguf"
    write_gguf(path, random_model(CONFIGS["llama"]), train_tokenizer(), dtype="f32")
    file = open_gguf(path)
    tensors = {name: (file.read(name), None) for name in file.tensors}
    metadata = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in file.metadata.items()}
    del metadata["general.architecture"]  # which gguf writes by itself
    write_file(larger, metadata, tensors)
    assert open_gguf_checkpoint(larger).config.layers == 3
    for more, count, refusal in (
        ({"blk.0.attn_q.bias": (np.zeros(64, np.float32), None)}, 3, "'blk.0.attn_q.bias' is unknown .0 missing, 1 "),
        ({}, 2, "'blk.2.attn_k.weight' is unknown .0 missing, 9 "),
    ):
        write_file(larger, metadata | {"llama.block_count": count}, tensors | more)
        with pytest.raises(InputError, match=f"larger.gguf: tensors do not fit the model: {refusal}unknown"):
            open_gguf_checkpoint(larger)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, random_model(CONFIGS["llama"]), train_tokenizer(), dtype="f32")
    content = path.read_bytes()
    for old, new, refusal in (
        (b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight", "'blk.1.ffn_up.weight' is missing"),
        (b"token_embd.weight", b"token_embx.weight", "it has no tensor 'token_embd.weight'"),
    ):
        path.write_bytes(content.replace(old, new))
        with pytest.raises(InputError, match=refusal):
            open_gguf_checkpoint(path)
