"""Families: for each architecture of `transformers`, its names for what our one decoder has.

A family is a table. Its tensors are named by a pattern with {layer} and {expert}; its traits are the fields of our
config that the architecture decides by itself; its keys are where config.json says the others; its defaults are what
`transformers` takes where a key is absent. hsai.interop.huggingface_config reads and writes config.json by it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from hsai.formats.storage import named_weights
from hsai.interop.entries import Entry
from hsai.models import TransformerConfig
from hsai.models.layers import is_matrix
from hsai.models.transformer import abstract_transformer

LAYER = "model.layers.{layer}."
TRAITS = ("norm_plus_one", "post_norm", "qk_norm", "qkv_bias", "scale_embeddings")

ATTENTION = {
    "embed": "model.embed_tokens.weight",
    "final_norm.gain": "model.norm.weight",
    "unembed": "lm_head.weight",
    "layers.attention_norm.gain": LAYER + "input_layernorm.weight",
    "layers.mlp_norm.gain": LAYER + "post_attention_layernorm.weight",
    "layers.attention.q": LAYER + "self_attn.q_proj.weight",
    "layers.attention.k": LAYER + "self_attn.k_proj.weight",
    "layers.attention.v": LAYER + "self_attn.v_proj.weight",
    "layers.attention.o": LAYER + "self_attn.o_proj.weight",
}
MLP = {f"layers.mlp.{name}": f"{LAYER}mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
BIASES = {f"layers.attention.{name}_bias": f"{LAYER}self_attn.{name}_proj.bias" for name in "qkv"}
QK_NORM = {f"layers.attention.{name}_norm.gain": f"{LAYER}self_attn.{name}_norm.weight" for name in "qk"}
QWEN_EXPERTS = {
    "layers.mlp.router": LAYER + "mlp.gate.weight",
    **{f"layers.mlp.{name}": f"{LAYER}mlp.experts.{{expert}}.{name}_proj.weight" for name in ("gate", "up", "down")},
}
MIXTRAL_EXPERTS = {
    "layers.mlp.router": LAYER + "block_sparse_moe.gate.weight",
    "layers.mlp.gate": LAYER + "block_sparse_moe.experts.{expert}.w1.weight",
    "layers.mlp.up": LAYER + "block_sparse_moe.experts.{expert}.w3.weight",
    "layers.mlp.down": LAYER + "block_sparse_moe.experts.{expert}.w2.weight",
}
GEMMA_NORMS = {
    "layers.attention_post_norm.gain": LAYER + "post_attention_layernorm.weight",
    "layers.mlp_norm.gain": LAYER + "pre_feedforward_layernorm.weight",
    "layers.mlp_post_norm.gain": LAYER + "post_feedforward_layernorm.weight",
}

KEYS = {
    "vocab": "vocab_size",
    "embed": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp": "intermediate_size",
    "max_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "tie_embeddings": "tie_word_embeddings",
}
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture."""

    architecture: str
    """As config.json names it among its architectures."""

    model_type: str
    """As config.json names it, too."""

    tensors: Mapping[str, str]
    """Our array -> the pattern of its tensors' names; those that a model has not are of no account."""

    traits: frozenset[str] = frozenset()
    """Which of TRAITS it has; the others it has not."""

    keys: Mapping[str, str] = dataclasses.field(default_factory=lambda: KEYS)
    """Our field -> the key of config.json."""

    defaults: Mapping[str, Any] = dataclasses.field(default_factory=lambda: DEFAULTS)
    """What a key says that is absent; a key which is in none of the two tables must be there."""

    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keys that must say this, where they are there; any other value is something that our decoder does not do."""

    window: bool = False
    """All layers have the window of the key sliding_window, if it says one."""

    alternating: bool = False
    """Some layers have the window, with a rotary embedding of their own, and others see all (Gemma 3)."""

    experts: tuple[str, ...] = ()
    """The keys that may say how many experts there are, the one to be written first."""

    def make_entries(self, config: TransformerConfig) -> list[Entry]:
        """The tensors of a model, in the order of its layers."""
        entries = []
        for leaf, param in named_weights(abstract_transformer(config)).items():
            stacked = [axis for axis in param.get_metadata("out_sharding") if axis in ("layers", "experts")]
            for index in np.ndindex(*param.get_value().shape[: len(stacked)]):
                names = dict(zip(("layer", "expert"), index, strict=False))
                name = self.tensors[leaf].format(**names)
                entries.append(Entry(name=name, leaf=leaf, index=index, transposed=is_matrix(param)))
        # The embedding, one layer after the other, the rest: a checkpoint in several files has whole layers in each.
        last = (config.layers,)
        return sorted(entries, key=lambda entry: entry.index[:1] or ((-1,) if entry.leaf == "embed" else last))


NO_WINDOW = {"use_sliding_window": False}
FAMILIES: tuple[Family, ...] = (
    Family(
        architecture="LlamaForCausalLM",
        model_type="llama",
        tensors=ATTENTION | MLP,
        fixed={"attention_bias": False, "mlp_bias": False, "sliding_window": None, "rope_interleaved": False},
    ),
    Family(
        architecture="MistralForCausalLM",
        model_type="mistral",
        tensors=ATTENTION | MLP,
        defaults=DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096},
        window=True,
    ),
    Family(
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        tensors=ATTENTION | MLP | BIASES,
        traits=frozenset({"qkv_bias"}),
        defaults=DEFAULTS | {"num_key_value_heads": 32},
        fixed=NO_WINDOW,
    ),
    Family(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        tensors=ATTENTION | MLP | QK_NORM,
        traits=frozenset({"qk_norm"}),
        defaults=DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128},
        fixed=NO_WINDOW | {"attention_bias": False},
    ),
    Family(
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        tensors=ATTENTION | QK_NORM | QWEN_EXPERTS,
        traits=frozenset({"qk_norm"}),
        keys=KEYS | {"mlp": "moe_intermediate_size"},
        defaults=DEFAULTS | {"num_key_value_heads": 4, "norm_topk_prob": False},
        fixed=NO_WINDOW | {"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        experts=("num_experts", "num_local_experts"),
    ),
    Family(
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        tensors=ATTENTION | MIXTRAL_EXPERTS,
        defaults=DEFAULTS | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None},
        window=True,
        experts=("num_local_experts", "num_experts"),
    ),
    Family(
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        tensors=ATTENTION | MLP | QK_NORM | GEMMA_NORMS,
        traits=frozenset({"qk_norm", "norm_plus_one", "post_norm", "scale_embeddings"}),
        keys=KEYS | {"activation": "hidden_activation"},
        defaults=DEFAULTS
        | {
            "hidden_activation": "gelu_pytorch_tanh",
            "head_dim": 256,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        fixed={
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        alternating=True,
    ),
)
