"""GGUF files for tests: made by gguf-py alone, or of small random models; and llama.cpp, which judges them."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import llama_cpp
import numpy as np
from flax import nnx
from gguf import GGMLQuantizationType, GGUFWriter

from hsai.data.tokenizer import END_OF_TEXT, Tokenizer
from hsai.formats.storage import named_weights, replace_weights
from hsai.interop.gguf_tokenizer import GgufTokenizer
from hsai.interop.gguf_write import add_metadata
from hsai.models import MoEConfig, RopeConfig, RopeScaling, Transformer, TransformerConfig

VOCAB = 320
LENGTH = 96
"""Tokens of the longest text."""
_SIZES = {
    "vocab": VOCAB,
    "embed": 64,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "mlp": 96,
    "max_length": 128,
    "dtype": "float32",
}
_GEMMA: dict[str, Any] = {
    "activation": "gelu",
    "norm_plus_one": True,
    "post_norm": True,
    "qk_norm": True,
    "scale_embeddings": True,
    "norm_eps": 1e-6,
    "head_dim": 32,
    "layers": 4,
}
_LLAMA3 = RopeConfig(
    theta=500_000.0, scaling=RopeScaling(kind="llama3", factor=8.0, high_freq_factor=4.0, original_length=32)
)
# Every architecture, with every trait that GGUF can say.
CONFIGS: dict[str, TransformerConfig] = {
    name: TransformerConfig(**(_SIZES | fields))
    for name, fields in {
        "llama": {},
        "llama3": {"rope": _LLAMA3, "tie_embeddings": False, "head_dim": 32},
        "linear": {"rope": RopeConfig(scaling=RopeScaling(kind="linear", factor=2.0))},
        "mixtral": {"moe": MoEConfig(experts=4, active=2), "tie_embeddings": False},
        "qwen2": {"qkv_bias": True, "norm_eps": 1e-6, "rope": RopeConfig(theta=1e6)},
        "qwen3": {"qk_norm": True, "head_dim": 32},
        "qwen3moe": {"qk_norm": True, "moe": MoEConfig(experts=6, active=2), "mlp": 32},
        "gemma3": _GEMMA
        | {
            "sliding_window": 8,
            "global_every": 2,
            "rope": RopeConfig(theta=1e6, scaling=RopeScaling(kind="linear", factor=4.0)),
            "local_rope": RopeConfig(theta=10_000.0),
        },
        "gemma3_global": _GEMMA,
    }.items()
}


@functools.cache
def random_model(config: TransformerConfig, seed: int = 0) -> Transformer:
    """A model whose gains and biases are random, too: one that stands in the wrong place changes the logits."""
    model = Transformer(config, rngs=nnx.Rngs(seed))
    values = {}
    for index, (name, param) in enumerate(named_weights(model).items()):
        value = param.get_value()
        if name.endswith(("gain", "bias")):
            noise = 0.3 * jax.random.normal(jax.random.key(1000 * seed + index), value.shape)
            value = value + noise
        values[name] = value
    return replace_weights(model, values)


@functools.cache
def train_tokenizer() -> GgufTokenizer:
    """A byte-level tokenizer with fewer tokens than the models have."""
    text = ["the quick brown fox jumps over the lazy dog, and the dog sleeps; " * 4, "def main():\n    return 42\n"] * 3
    backend = Tokenizer.train(text, VOCAB - 16)._backend
    return GgufTokenizer(
        backend=backend, bos=END_OF_TEXT, eos=END_OF_TEXT, stops=(END_OF_TEXT,), add_bos=True, chat_template=None
    )


@jax.jit
def _forward(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model.logits(model(tokens)[0])


def our_logits(model: Transformer, ids: Sequence[int]) -> np.ndarray:
    """float32 (T, V); compiled once a model, for the longest text, since no token looks at what follows it."""
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(_forward(model, tokens)[0, : len(ids)])


def open_llama(path: Path, **options: Any) -> llama_cpp.Llama:
    """llama.cpp with a cache in float32, so that nothing is rounded that the file does not round."""
    precise = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    settings = {"n_ctx": 128, "logits_all": True, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    return llama_cpp.Llama(str(path), **(precise | settings | options))


def llama_logits(llama: llama_cpp.Llama, ids: Sequence[int]) -> np.ndarray:
    """float32 (T, V)."""
    llama.reset()
    llama.eval(list(ids))
    return np.array(llama.scores[: len(ids)], np.float32)


def write_file(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[np.ndarray, GGMLQuantizationType | None]],
    architecture: str = "llama",
) -> Path:
    """A file by gguf-py: tensors are arrays of numbers, or of a type's bytes."""
    writer = GGUFWriter(path, architecture)
    add_metadata(writer, metadata)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def margin(logits: np.ndarray) -> np.ndarray:
    """(T,): how far the likeliest token is ahead of the next one."""
    top = np.sort(logits, axis=-1)[:, -2:]
    return top[:, 1] - top[:, 0]
