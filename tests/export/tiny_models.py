"""Models small enough to export in a test, in every format."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from hsai.data.tokenizer import Tokenizer
from hsai.formats import (
    DenseConfig,
    FormatConfig,
    Int2Config,
    Int3Config,
    Int4Config,
    Int4OffsetConfig,
    Int8Config,
    NMConfig,
    NMInt4Config,
    NMInt8Config,
    OutliersConfig,
    UnstructuredInt4Config,
    VNMConfig,
    VNMInt4Config,
)
from hsai.formats.storage import join_path, named_weights, replace_weights
from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import abstract_transformer

FORMATS: dict[str, FormatConfig] = {
    "dense": DenseConfig(dtype="float32"),
    "int8": Int8Config(),
    "int4": Int4Config(),
    "int4_offset": Int4OffsetConfig(),
    "int3": Int3Config(),
    "int2": Int2Config(),
    "nm": NMConfig(),
    "nm_int8": NMInt8Config(),
    "nm_int4": NMInt4Config(),
    "vnm": VNMConfig(v=16),
    "vnm_int4": VNMInt4Config(v=16, group=128),
    "outliers": OutliersConfig(base=UnstructuredInt4Config(), share=0.02),
}


def make_config(**changes: Any) -> TransformerConfig:
    """Grouped-query attention, contractions that every format's blocks divide, float32 so that sums can be compared."""
    sizes = dict(vocab=512, embed=128, layers=2, heads=4, kv_heads=2, head_dim=32, mlp=256, max_length=48)
    return TransformerConfig(**{**sizes, "dtype": "float32", **changes})


def pack_matrices(model: Transformer, format_name: str) -> Transformer:
    """Every matrix in the named format; norms stay dense."""
    matrices = {name: param.get_value() for name, param in named_weights(model).items() if "norm" not in name}
    return replace_weights(model, {name: FORMATS[format_name].pack(value) for name, value in matrices.items()})


@functools.cache
def make_model(format_name: str = "dense", **changes: Any) -> Transformer:
    """Random weights, gains included; not to be changed. Drawn by numpy: nothing is compiled for it."""
    draw = np.random.default_rng(0)

    def fill(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        is_gain = "norm" in join_path(path)
        value = draw.uniform(0.5, 1.5, shape.shape) if is_gain else draw.normal(0, shape.shape[-2] ** -0.5, shape.shape)
        return jnp.asarray(value, shape.dtype)

    dense = jax.tree_util.tree_map_with_path(fill, abstract_transformer(make_config(**changes)))
    return jax.jit(pack_matrices, static_argnums=1)(dense, format_name)


def make_shapes(format_name: str, **changes: Any) -> Transformer:
    """Shapes in place of arrays, which is all that an export reads."""
    return jax.eval_shape(lambda model: pack_matrices(model, format_name), abstract_transformer(make_config(**changes)))


def make_tokenizer() -> Tokenizer:
    """280 tokens, fewer than the models have; its end of text is 0."""
    return Tokenizer.train(["def main(): return 'héron 数据 😀' # hello world, hello bundle\n" * 3], 280)


def make_chatty_tokenizer() -> Tokenizer:
    """The same, with a prefix and stops that are not its end of text."""
    backend = tokenizers.Tokenizer.from_str(make_tokenizer().to_json())
    backend.add_special_tokens(["<|user|>", "<|assistant|>", "<|system|>", "<|begin|>", "<|end|>"])
    return Tokenizer(backend, prefix=("<|begin|>",), stops=("<|end|>", "<|user|>"))


CHATTY_ASSETS = {
    "chat_template.jinja": b"{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>",
    "generation_config.json": b'{"do_sample": true,\r\n "temperature": 0.7}',
    "tokenizer_config.json": b'{"eos_token": "<|endoftext|>"}',
}


def full_logits(model: Transformer, ids: np.ndarray) -> np.ndarray:
    """float32 (T, V) logits of one uncached forward pass over the tokens `ids` (T,).

    They are padded behind to the longest context, which a causal model does not notice, and one program serves all T.
    """
    padded = np.zeros((1, model.config.max_length), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(_forward(model, padded)[0, : len(ids)])


@jax.jit
def _forward(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model.logits(model(tokens)[0])


def snapshot(directory: Path) -> dict[str, str]:
    """A digest of every file under `directory`, by its name."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
