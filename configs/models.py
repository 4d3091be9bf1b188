"""Shapes of released models, as configurations of the one decoder.

Each function's sizes are those of the `config.json` that its authors published with the weights on Hugging Face; the
parameter counts are held by tests. Fork one with `dataclasses.replace(models.smollm2_135m(), layers=12)`.
"""

from hsai.models import MoEConfig, RopeConfig, RopeScaling, TransformerConfig


def llama3_8b() -> TransformerConfig:
    """Llama 3 8B: 8,030,261,248 parameters. Source: meta-llama/Meta-Llama-3-8B, config.json; 2407.21783, table 3."""
    return TransformerConfig(
        vocab=128_256,
        embed=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14_336,
        max_length=8192,
        tie_embeddings=False,
        rope=RopeConfig(theta=500_000.0),
    )


def llama3_2_1b() -> TransformerConfig:
    """Llama 3.2 1B: 1,235,814,400 parameters. Source: meta-llama/Llama-3.2-1B, config.json."""
    scaling = RopeScaling(kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    return TransformerConfig(
        vocab=128_256,
        embed=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        mlp=8192,
        max_length=131_072,
        tie_embeddings=True,
        rope=RopeConfig(theta=500_000.0, scaling=scaling),
    )


def smollm2_135m() -> TransformerConfig:
    """SmolLM2 135M: 134,515,008 parameters. Source: HuggingFaceTB/SmolLM2-135M, config.json; 2502.02737."""
    return TransformerConfig(
        vocab=49_152,
        embed=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        mlp=1536,
        max_length=8192,
        tie_embeddings=True,
        rope=RopeConfig(theta=100_000.0),
    )


def qwen3_0_6b() -> TransformerConfig:
    """Qwen 3 0.6B: 596,049,920 parameters. Source: Qwen/Qwen3-0.6B, config.json; 2505.09388, table 1."""
    return TransformerConfig(
        vocab=151_936,
        embed=1024,
        layers=28,
        heads=16,
        kv_heads=8,
        head_dim=128,
        mlp=3072,
        max_length=40_960,
        norm_eps=1e-6,
        qk_norm=True,
        tie_embeddings=True,
        rope=RopeConfig(theta=1_000_000.0),
    )


def mistral_7b() -> TransformerConfig:
    """Mistral 7B v0.1: 7,241,732,096 parameters. Source: mistralai/Mistral-7B-v0.1, config.json; 2310.06825, tab. 1."""
    return TransformerConfig(
        vocab=32_000,
        embed=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14_336,
        max_length=32_768,
        sliding_window=4096,
        tie_embeddings=False,
        rope=RopeConfig(theta=10_000.0),
    )


def qwen2_5_0_5b() -> TransformerConfig:
    """Qwen 2.5 0.5B: 494,032,768 parameters. Source: Qwen/Qwen2.5-0.5B, config.json; 2412.15115, table 1."""
    return TransformerConfig(
        vocab=151_936,
        embed=896,
        layers=24,
        heads=14,
        kv_heads=2,
        head_dim=64,
        mlp=4864,
        max_length=32_768,
        norm_eps=1e-6,
        qkv_bias=True,
        tie_embeddings=True,
        rope=RopeConfig(theta=1_000_000.0),
    )


def qwen3_30b_a3b() -> TransformerConfig:
    """Qwen 3 30B-A3B: 30,532,122,624 parameters. Source: Qwen/Qwen3-30B-A3B, config.json; 2505.09388, table 2."""
    return TransformerConfig(
        vocab=151_936,
        embed=2048,
        layers=48,
        heads=32,
        kv_heads=4,
        head_dim=128,
        mlp=768,
        max_length=40_960,
        norm_eps=1e-6,
        qk_norm=True,
        tie_embeddings=False,
        moe=MoEConfig(experts=128, active=8),
        rope=RopeConfig(theta=1_000_000.0),
    )


def mixtral_8x7b() -> TransformerConfig:
    """Mixtral 8x7B: 46,702,792,704 parameters. Source: mistralai/Mixtral-8x7B-v0.1, config.json; 2401.04088, tab. 1."""
    return TransformerConfig(
        vocab=32_000,
        embed=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14_336,
        max_length=32_768,
        tie_embeddings=False,
        moe=MoEConfig(experts=8, active=2),
        rope=RopeConfig(theta=1_000_000.0),
    )


def gemma3_1b() -> TransformerConfig:
    """Gemma 3 1B: 999,885,952 parameters. Source: google/gemma-3-1b-pt, config.json; 2503.19786, table 1."""
    return TransformerConfig(
        vocab=262_144,
        embed=1152,
        layers=26,
        heads=4,
        kv_heads=1,
        head_dim=256,
        mlp=6912,
        max_length=32_768,
        activation="gelu",
        norm_eps=1e-6,
        norm_plus_one=True,
        post_norm=True,
        qk_norm=True,
        scale_embeddings=True,
        sliding_window=512,
        global_every=6,
        tie_embeddings=True,
        rope=RopeConfig(theta=1_000_000.0),
        local_rope=RopeConfig(theta=10_000.0),
    )
