"""config.json: what is read says what it said, in either form; what our decoder does not do is refused by name."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from hsai.errors import InputError
from hsai.interop.families import FAMILIES
from hsai.interop.huggingface_config import read_config, write_config
from hsai.models import MoEConfig, RopeConfig, RopeScaling, TransformerConfig

SIZES: dict[str, Any] = {
    "vocab_size": 9,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": None,
    "max_position_embeddings": 16,
}
LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"]}
MISTRAL = SIZES | {"architectures": ["MistralForCausalLM"]}
QWEN = SIZES | {"architectures": ["Qwen2ForCausalLM"]}
GEMMA = SIZES | {"architectures": ["Gemma3ForCausalLM"], "sliding_window": 5}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
QWEN_MOE = SIZES | {"architectures": ["Qwen3MoeForCausalLM"], "head_dim": 4} | EXPERTS
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GLOBAL, LOCAL = "full_attention", "sliding_attention"


def read(raw: dict[str, Any]) -> TransformerConfig:
    return read_config(raw)[1]


def test_what_is_absent_has_the_default_of_transformers() -> None:
    config = read(LLAMA)
    assert (config.kv_heads, config.head_dim, config.norm_eps, config.rope) == (2, 4, 1e-6, RopeConfig(theta=1e4))
    assert not config.tie_embeddings and config.sliding_window is None and config.activation == "silu"
    absent = {key: value for key, value in MISTRAL.items() if key != "num_key_value_heads"}
    assert read(absent | {"num_attention_heads": 16, "hidden_size": 32}).kv_heads == 8
    assert read(MISTRAL).sliding_window == 4096 and read(MISTRAL | {"sliding_window": None}).sliding_window is None
    gemma = read(GEMMA | {"num_hidden_layers": 12})
    assert (gemma.head_dim, gemma.query_scalar, gemma.global_every, gemma.tie_embeddings) == (256, None, 6, True)
    assert (gemma.rope, gemma.local_rope) == (RopeConfig(theta=1e6), RopeConfig(theta=1e4))
    assert gemma.activation == "gelu" and gemma.post_norm and gemma.norm_plus_one and gemma.scale_embeddings
    assert read(QWEN_MOE).moe == MoEConfig(experts=4, active=2, normalize=False) and read(QWEN_MOE).mlp == 6


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_both_forms_of_rotary_embeddings_are_read(key: str) -> None:
    scaling = RopeScaling(kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    raw = LLAMA | ({key: LLAMA3, "rope_theta": 5e5} if key == "rope_scaling" else {key: LLAMA3 | {"rope_theta": 5e5}})
    assert read(raw).rope == RopeConfig(theta=5e5, scaling=scaling)
    linear = {"type": "linear", "factor": 4.0}
    raw = LLAMA | ({key: linear, "rope_theta": 7e3} if key == "rope_scaling" else {key: linear | {"rope_theta": 7e3}})
    assert read(raw).rope == RopeConfig(theta=7e3, scaling=RopeScaling(kind="linear", factor=4.0))
    assert read(LLAMA | {"rope_scaling": None, "rope_theta": 123}).rope == RopeConfig(theta=123.0)


@pytest.mark.parametrize(
    ("kinds", "every"),
    [
        ([LOCAL, LOCAL, LOCAL, GLOBAL], 4),
        ([LOCAL, GLOBAL, LOCAL, GLOBAL], 2),
        ([LOCAL, LOCAL, GLOBAL, LOCAL], 3),
        ([LOCAL] * 4, 6),
    ],
)
def test_layers_by_name_or_by_pattern(kinds: list[str], every: int) -> None:
    config = read(GEMMA | {"layer_types": kinds})
    assert (config.global_every, config.sliding_window) == (every, 5)
    assert [config.is_global(layer) for layer in range(4)] == [kind == GLOBAL for kind in kinds]
    pattern = read(GEMMA | {"sliding_window_pattern": every})
    assert [pattern.is_global(layer) for layer in range(4)] == [kind == GLOBAL for kind in kinds]
    assert read(GEMMA | {"sliding_window_pattern": 1}).sliding_window is None
    assert read(GEMMA | {"layer_types": [GLOBAL] * 4}).sliding_window is None


CONFIGS = [
    LLAMA,
    LLAMA | {"rope_scaling": LLAMA3, "head_dim": 6, "num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"},
    MISTRAL,
    QWEN | {"tie_word_embeddings": True},
    QWEN_MOE,
    SIZES | {"architectures": ["Qwen3ForCausalLM"]},
    SIZES | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
    GEMMA | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    GEMMA | {"layer_types": [GLOBAL] * 4, "query_pre_attn_scalar": 7},
]


@pytest.mark.parametrize("raw", CONFIGS, ids=lambda raw: raw["architectures"][0])
def test_what_is_written_is_read_as_the_same(raw: dict[str, Any]) -> None:
    family, config = read_config(raw)
    again, written = write_config(config, family.architecture)
    assert again is family and read_config(json.loads(json.dumps(written))) == (family, config)
    assert {family.architecture for family in FAMILIES} == {raw["architectures"][0] for raw in CONFIGS}


def test_a_family_is_found_by_what_it_computes() -> None:
    """A Mistral without a window is a Llama, and stays a Mistral only if that is asked for."""
    config = read(MISTRAL | {"sliding_window": None})
    assert write_config(config)[0].architecture == "LlamaForCausalLM"
    assert write_config(config, "MistralForCausalLM")[0].architecture == "MistralForCausalLM"
    assert write_config(dataclasses.replace(config, qkv_bias=True), "MistralForCausalLM")[0].architecture.startswith(
        "Qwen2"
    )
    both = dataclasses.replace(config, qkv_bias=True, qk_norm=True)
    with pytest.raises(InputError, match="no architecture of transformers computes this model"):
        write_config(both)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        LLAMA | {"architectures": ["LlamaForCausalML"]},
        "architecture LlamaForCausalML is unknown; did you mean LlamaForCa",
    ),
    (SIZES, "architecture None is unknown"),
    (SIZES | {"architectures": "LlamaForCausalLM"}, "architectures is LlamaForCausalLM, and not a list"),
    (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "quantization_config 'gptq' is not supported"),
    (LLAMA | {"attention_bias": True}, "attention_bias=True is not supported in LlamaForCausalLM: it must be False"),
    (LLAMA | {"mlp_bias": True}, "mlp_bias=True is not supported"),
    (LLAMA | {"hidden_act": "relu"}, "hidden_act='relu' is not supported; valid: silu, gelu_pytorch_tanh"),
    (LLAMA | {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    (LLAMA | {"logit_scale": 0.5}, "logit_scale=0.5 is unknown for LlamaForCausalLM"),
    (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type='yarn' is not supported"),
    (LLAMA | {"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.rope_type='dynamic' is not supported"),
    (
        LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor=0.5 is unknown",
    ),
    (LLAMA | {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": "8"}}, "rope_scaling.factor: expected float, got '8'"),
    (LLAMA | {"rope_scaling": [1]}, r"rope_scaling is \[1\], and not an object"),
    (LLAMA | {"rope_theta": "big"}, "rope_theta: expected float, got 'big'"),
    (LLAMA | {"hidden_size": 8.5}, "hidden_size: expected int, got 8.5"),
    (LLAMA | {"hidden_size": None}, "hidden_size is missing"),
    (LLAMA | {"num_attention_heads": 0}, "model.heads=0 must be at least 1"),
    (LLAMA | {"num_hidden_layers": -3}, "model.layers=-3 must be at least 1"),
    (LLAMA | {"tie_word_embeddings": "no"}, "tie_word_embeddings: expected bool, got 'no'"),
    (LLAMA | {"sliding_window": 4}, "sliding_window=4 is not supported in LlamaForCausalLM"),
    (QWEN | {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    (QWEN | {"layer_types": [LOCAL, GLOBAL] * 2}, "layer_types names sliding_attention, and sliding_window is missing"),
    (MISTRAL | {"layer_types": [LOCAL, GLOBAL] * 2}, "layer_types mixes full_attention and sliding_attention"),
    (
        MISTRAL | {"layer_types": [LOCAL]},
        "layer_types must be full_attention or sliding_attention for each of 4 layers",
    ),
    (MISTRAL | {"layer_types": ["linear_attention"] * 4}, "layer_types must be full_attention or sliding_attention"),
    (
        GEMMA | {"layer_types": [GLOBAL, LOCAL, LOCAL, LOCAL]},
        "layer_types does not have full_attention at every 1th layer",
    ),
    (GEMMA | {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
    (GEMMA | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
    (
        GEMMA | {"rope_parameters": {"rope_type": "default"}},
        "rope_parameters must have full_attention and sliding_attent",
    ),
    (QWEN_MOE | {"num_experts": None}, "num_experts is missing"),
    (QWEN_MOE | {"num_experts_per_tok": 5}, "moe.active=5 must be between 1 and moe.experts=4"),
    (QWEN_MOE | {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported"),
    (QWEN_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
    (QWEN_MOE | {"shared_expert_intermediate_size": 9}, "shared_expert_intermediate_size=9 is unknown"),
]


@pytest.mark.parametrize(("raw", "message"), REFUSED, ids=[re.sub(r"\W+", " ", message)[:50] for _, message in REFUSED])
def test_what_we_do_not_compute_is_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_config(raw)
    assert "\n" not in str(caught.value)


def test_harmless_keys_are_harmless(tmp_path: Path) -> None:
    """All that a released config.json says besides: here that of SmolLM2."""
    extra = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": [1, 2],
        "initializer_range": 0.041666666666666664,
        "is_llama_config": True,
        "mlp_bias": False,
        "model_type": "llama",
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "transformers_version": "4.42.3",
        "use_cache": True,
    }
    assert read(LLAMA | extra) == read(LLAMA)
