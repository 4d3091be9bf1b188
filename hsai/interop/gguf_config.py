"""A model's config from the metadata of a GGUF file, and the metadata from a config.

No key of the architecture is passed over: one that is not known might change the numbers, and is refused by name. What
is written is read again and compared, so what GGUF cannot say of a model is refused too.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from hsai.errors import InputError
from hsai.interop.gguf_container import Metadata, quote
from hsai.interop.gguf_names import ARCHITECTURES, Architecture
from hsai.interop.gguf_rope import fit_scaling, rope_factors, same_rotation
from hsai.models import MoEConfig, RopeConfig, RopeScaling, TransformerConfig

# Keys that say what is so in any case; another value is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attn_logit_softcapping": (0.0,),
    "expert_gating_func": (1,),  # softmax
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
}
# Keys that no number depends on.
_IDLE = ("rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout")
_GEMMA_LARGEST = 62
"""Layers of Gemma 3 27B, the one whose scores llama.cpp scales by embed / heads in the place of head_dim."""


def read_config(
    metadata: Metadata, *, vocab: int, tied: bool, factors: np.ndarray | None = None
) -> tuple[Architecture, TransformerConfig]:
    """The architecture and the model's config, whose activations are float32.

    Args:
      metadata: of the file.
      vocab: rows of its embedding.
      tied: it has no output projection.
      factors: its tensor `ROPE_FACTORS`.
    Raises:
      InputError: the architecture is not known; a key is missing, unknown, of another type, or says what our model does
        not do.
    """
    path = metadata.path
    name = metadata.take("general.architecture", str)
    if name not in ARCHITECTURES:
        raise InputError(
            f"{path}: the architecture {quote(name)} is not read; those that are: {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[name]

    def take(key: str, kind: type, default: Any = None) -> Any:
        return metadata.take(f"{name}.{key}", kind, default)

    def take_same(key: str, default: Any = None) -> int:
        """A number that may stand there once a layer."""
        values = metadata.get(f"{name}.{key}")
        if isinstance(values, np.ndarray) and values.size and np.all(values == values[0]):
            metadata.used.add(f"{name}.{key}")
            return int(values[0])
        return int(take(key, int, default))

    embed, layers = take("embedding_length", int), take("block_count", int)
    heads = take_same("attention.head_count")
    if not 0 < heads <= embed:
        raise InputError(f"{path}: {name}.attention.head_count={heads} is impossible with embedding_length={embed}")
    head_dim = take("attention.key_length", int, embed // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (width := take(key, int, head_dim)) != head_dim:
            raise InputError(f"{path}: {name}.{key}={width} differs from the keys' width, {head_dim}; this is not read")
    if (rows := take("vocab_size", int, vocab)) != vocab:
        raise InputError(f"{path}: {name}.vocab_size={rows}, and the embedding has {vocab} rows")
    mlp = take_same("feed_forward_length")
    moe = None
    if take("expert_count", int, 0):
        moe = MoEConfig(experts=take("expert_count", int), active=take("expert_used_count", int))
        mlp = take("expert_feed_forward_length", int, None if architecture.experts else mlp)
    if architecture.experts is not None and (moe is not None) != architecture.experts:
        raise InputError(f"{path}: {name}.expert_count={take('expert_count', int, 0)} does not fit the architecture")
    rope = _read_rope(metadata, architecture, head_dim, factors)
    fields = dict(architecture.fields)
    if architecture.windows:
        fields |= _read_windows(metadata, architecture)
    if name == "gemma3":
        fields["query_scalar"] = embed // heads if layers == _GEMMA_LARGEST else head_dim
    config = TransformerConfig(
        vocab=vocab,
        embed=embed,
        layers=layers,
        heads=heads,
        kv_heads=take_same("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp=mlp,
        max_length=take("context_length", int),
        norm_eps=_shorten(take("attention.layer_norm_rms_epsilon", float)),
        moe=moe,
        tie_embeddings=tied,
        rope=rope,
        dtype="float32",
        **fields,
    )
    _refuse_rest(metadata, name)
    return architecture, config


def _read_rope(metadata: Metadata, architecture: Architecture, head_dim: int, factors: np.ndarray | None) -> RopeConfig:
    prefix, path = f"{architecture.name}.rope", metadata.path
    theta = _shorten(metadata.take(f"{prefix}.freq_base", float, 10_000.0))
    kind = metadata.take(f"{prefix}.scaling.type", str, "linear")  # which is llama.cpp's default
    factor = _shorten(metadata.take(f"{prefix}.scaling.factor", float, 1.0))
    if kind not in ("linear", "none"):
        raise InputError(f"{path}: {prefix}.scaling.type is {quote(kind)}; those that are read are none and linear")
    linear = kind == "linear" and factor not in (0.0, 1.0)
    if factors is None:
        return RopeConfig(theta=theta, scaling=RopeScaling(kind="linear", factor=factor) if linear else None)
    if linear or not architecture.rope_factors:
        raise InputError(f"{path}: it has factors for its rope frequencies, which do not fit {prefix}")
    return RopeConfig(theta=theta, scaling=fit_scaling(factors, theta, head_dim, str(path)))


def _read_windows(metadata: Metadata, architecture: Architecture) -> dict[str, Any]:
    """Which layers see how far."""
    name = architecture.name
    window = metadata.take(f"{name}.attention.sliding_window", int, 0) or None
    if name != "gemma3":
        return {"sliding_window": window}
    every = metadata.take(f"{name}.attention.sliding_window_pattern", int, 6)
    theta = _shorten(metadata.take(f"{name}.rope.freq_base_swa", float, 10_000.0))
    if window is None:
        return {}
    return {"sliding_window": window, "global_every": every, "local_rope": RopeConfig(theta=theta)}


def _refuse_rest(metadata: Metadata, name: str) -> None:
    """Refuses keys of the architecture that were not used, unless they change nothing."""
    for key, value in metadata.items():
        short = key.removeprefix(f"{name}.")
        if key == short or key in metadata.used or short in _IDLE:
            continue
        if isinstance(value, np.ndarray) or value not in _NEUTRAL.get(short, ()):
            raise InputError(
                f"{metadata.path}: {key}={quote(value)} is not known; it may change what the model computes"
            )


def write_config(config: TransformerConfig) -> tuple[Architecture, dict[str, Any], np.ndarray | None]:
    """The architecture that a model is of, its metadata, and the tensor `ROPE_FACTORS` if it needs one.

    Raises:
      InputError: no architecture of llama.cpp has such a model.
    """
    architecture = ARCHITECTURES[_choose(config)]
    metadata = _describe(config, architecture)
    scaling = config.rope.scaling
    factors = rope_factors(config.rope, config.head_dim) if scaling is not None and scaling.kind == "llama3" else None
    known = Metadata(Path("GGUF"), metadata)
    _, read = read_config(known, vocab=config.vocab, tied=config.tie_embeddings, factors=factors)
    wanted, read = _settle(config), _settle(read)
    if same_rotation(wanted.rope, read.rope, config.head_dim):
        read = dataclasses.replace(read, rope=wanted.rope)
    for field in dataclasses.fields(TransformerConfig):
        ours, theirs = getattr(wanted, field.name), getattr(read, field.name)
        if ours != theirs:
            raise InputError(
                f"GGUF's architecture {architecture.name} cannot say model.{field.name}={ours}: it has {theirs}"
            )
    return architecture, metadata, factors


def _choose(config: TransformerConfig) -> str:
    """The architecture that has most of a model's traits; what it lacks of them shows when its metadata are read."""
    if config.norm_plus_one or config.post_norm or config.scale_embeddings:
        return "gemma3"
    if config.qkv_bias:
        return "qwen2"
    if config.qk_norm:
        return "qwen3" if config.moe is None else "qwen3moe"
    return "llama"


def _describe(config: TransformerConfig, architecture: Architecture) -> dict[str, Any]:
    c, name = config, architecture.name
    values: dict[str, Any] = {
        "vocab_size": c.vocab,
        "context_length": c.max_length,
        "embedding_length": c.embed,
        "block_count": c.layers,
        "feed_forward_length": c.mlp,
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": float(c.rope.theta),
    }
    scaling = c.rope.scaling
    if scaling is not None and scaling.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    if c.moe is not None:
        values |= {"expert_count": c.moe.experts, "expert_used_count": c.moe.active}
        if architecture.experts:
            values["expert_feed_forward_length"] = c.mlp
    if c.sliding_window is not None and architecture.windows:
        values["attention.sliding_window"] = c.sliding_window
        if c.global_every is not None and not architecture.ignores_windows:
            values["attention.sliding_window_pattern"] = c.global_every
            values["rope.freq_base_swa"] = float((c.local_rope or c.rope).theta)
    return {"general.architecture": name} | {f"{name}.{key}": value for key, value in values.items()}


def _settle(config: TransformerConfig) -> TransformerConfig:
    """The config with what is the same said in the same way, and numbers as float32 keeps them."""

    def rope(found: RopeConfig) -> RopeConfig:
        return dataclasses.replace(found, theta=_shorten(found.theta))

    local = config.local_rope or config.rope
    return dataclasses.replace(
        config,
        norm_eps=_shorten(config.norm_eps),
        query_scalar=config.query_scalar or config.head_dim,
        rope=rope(config.rope),
        local_rope=None if config.global_every is None else rope(local),
        dtype="float32",
    )


def _shorten(number: float) -> float:
    """The shortest decimal number that is the same float32: 1e-05, where a file's float32 reads 9.99999974e-06."""
    return float(str(np.float32(number)))
