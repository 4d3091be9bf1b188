"""How the checkpoints of the tests are made: sizes that are no powers of two, no weight where it hides a mistake."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = dict(
    vocab_size=99,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint: its config class, what differs from SIZES, and the largest size of one of its files."""

    config: type
    changes: dict[str, Any]
    shard: str = "1GB"

    @property
    def vocab(self) -> int:
        """Token ids are below it."""
        return int((SIZES | self.changes)["vocab_size"])


T = transformers
FAMILIES: dict[str, Case] = {
    "llama": Case(T.LlamaConfig, {"rope_parameters": LLAMA3}, shard="60KB"),
    "smollm2": Case(T.LlamaConfig, {"tie_word_embeddings": True, "num_attention_heads": 5, "num_key_value_heads": 1}),
    "mistral": Case(T.MistralConfig, {"sliding_window": 4, "head_dim": 12}),
    "qwen2": Case(T.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": Case(T.Qwen3Config, {"head_dim": 16}),
    "qwen3_moe": Case(
        T.Qwen3MoeConfig,
        {
            "head_dim": 16,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": False,
        },
    ),
    "mixtral": Case(T.MixtralConfig, {"num_local_experts": 45, "num_experts_per_tok": 2, "intermediate_size": 12}),
    "gemma3": Case(
        T.Gemma3TextConfig,
        {
            "num_hidden_layers": 7,
            "head_dim": 16,
            "sliding_window": 4,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 24,
            "rope_parameters": GEMMA_ROPES,
        },
    ),
}


def make_checkpoint(name: str, directory: Path) -> transformers.PreTrainedModel:
    """Writes the checkpoint, and returns its model, float32 and not training."""
    torch.manual_seed(sum(map(ord, name)))
    case = FAMILIES[name]
    config = case.config(**SIZES | case.changes)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            is_gain = label.endswith("norm.weight")
            parameter.normal_(0.0, 0.1 if is_gain else 0.2)
            if is_gain and name != "gemma3":
                parameter.add_(1.0)
    model.save_pretrained(directory, safe_serialization=True, max_shard_size=case.shard)
    return model
