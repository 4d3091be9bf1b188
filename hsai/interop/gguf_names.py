"""The tensors of GGUF files: which slice of our arrays each one is, for every architecture that is read and written.

Names and orientations are those of llama.cpp's src/llama-arch.cpp. Files of the architecture "llama" have the outputs
of queries and keys in the order of Meta's own checkpoints (each rotated pair side by side); the others have ours.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from hsai.interop.entries import Entry
from hsai.models import TransformerConfig

ROPE_FACTORS = "rope_freqs.weight"
"""What each frequency is divided by, float32 (H / 2): how files of Llama 3.1 and later say their rope scaling."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A `general.architecture` of llama.cpp, and which of our models it is."""

    name: str

    fields: Mapping[str, Any]
    """The fields of `TransformerConfig` that are not in a file's metadata, since the architecture has them so."""

    paired: bool = False
    """Queries and keys have each rotated pair side by side."""

    experts: bool | None = False
    """Whether its feed-forward blocks are experts; None: by the file's metadata."""

    windows: bool = False
    """Its layers may have a window."""

    ignores_windows: bool = False
    """llama.cpp reads the window, and lets every layer see all."""

    rope_factors: bool = False
    """Llama 3's rope scaling can be said."""


_PLAIN = {
    "activation": "silu",
    "norm_plus_one": False,
    "post_norm": False,
    "qk_norm": False,
    "qkv_bias": False,
    "scale_embeddings": False,
}
_GEMMA = {"activation": "gelu", "norm_plus_one": True, "post_norm": True, "qk_norm": True, "scale_embeddings": True}

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            name="llama",
            fields=_PLAIN,
            paired=True,
            experts=None,
            windows=True,
            ignores_windows=True,
            rope_factors=True,
        ),
        Architecture(name="qwen2", fields=_PLAIN | {"qkv_bias": True}),
        Architecture(name="qwen3", fields=_PLAIN | {"qk_norm": True}),
        Architecture(name="qwen3moe", fields=_PLAIN | {"qk_norm": True}, experts=True),
        Architecture(name="gemma3", fields=_PLAIN | _GEMMA, windows=True),
    )
}


def list_entries(architecture: Architecture, config: TransformerConfig) -> list[Entry]:
    """The tensors of a file with the model of `config`, in the order in which llama.cpp writes them."""
    entries = [Entry(name="token_embd.weight", leaf="embed", transposed=True)]
    for layer in range(config.layers):
        entries += _list_block(architecture, config, layer)
    entries.append(Entry(name="output_norm.weight", leaf="final_norm.gain", offset=float(config.norm_plus_one)))
    if not config.tie_embeddings:
        entries.append(Entry(name="output.weight", leaf="unembed", transposed=True))
    return entries


def _list_block(architecture: Architecture, config: TransformerConfig, layer: int) -> Iterator[Entry]:
    def entry(name: str, leaf: str, **turns: Any) -> Entry:
        return Entry(name=f"blk.{layer}.{name}", leaf=f"layers.{leaf}", index=(layer,), **turns)

    def gain(name: str, leaf: str) -> Entry:
        return entry(f"{name}.weight", f"{leaf}.gain", offset=float(config.norm_plus_one))

    c = config
    yield gain("attn_norm", "attention_norm")
    for part, heads in (("q", c.heads), ("k", c.kv_heads), ("v", None)):
        pairs = heads if architecture.paired else None
        yield entry(f"attn_{part}.weight", f"attention.{part}", transposed=True, rotary_heads=pairs)
        if c.qkv_bias:
            yield entry(f"attn_{part}.bias", f"attention.{part}_bias", rotary_heads=pairs)
    if c.qk_norm:
        yield gain("attn_q_norm", "attention.q_norm")
        yield gain("attn_k_norm", "attention.k_norm")
    yield entry("attn_output.weight", "attention.o", transposed=True)
    if c.post_norm:
        yield gain("post_attention_norm", "attention_post_norm")
    yield gain("ffn_norm", "mlp_norm")
    kind = "" if c.moe is None else "_exps"
    if c.moe is not None:
        yield entry("ffn_gate_inp.weight", "mlp.router", transposed=True)
    for part in ("gate", "up", "down"):
        yield entry(f"ffn_{part}{kind}.weight", f"mlp.{part}", transposed=True)
    if c.post_norm:
        yield gain("post_ffw_norm", "mlp_post_norm")
