"""Parameter counts equal the published ones; flops follow the stated convention; unknown chips have no peak."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from configs import models
from hsai.models import TransformerConfig
from hsai.train.flops import PEAK_FLOPS, flops_per_token, matmul_parameter_count, parameter_count, peak_flops

# Published: the parameter totals of the safetensors index files on Hugging Face.
PUBLISHED = {
    models.llama3_8b: 8_030_261_248,
    models.llama3_2_1b: 1_235_814_400,
    models.smollm2_135m: 134_515_008,
    models.qwen3_0_6b: 596_049_920,
    models.mistral_7b: 7_241_732_096,
    models.qwen2_5_0_5b: 494_032_768,
    models.qwen3_30b_a3b: 30_532_122_624,
    models.mixtral_8x7b: 46_702_792_704,
    models.gemma3_1b: 999_885_952,
}

TINY = TransformerConfig(
    vocab=100, embed=32, layers=3, heads=4, kv_heads=2, head_dim=16, mlp=48, max_length=64, tie_embeddings=False
)


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model.__name__)
def test_released_models_have_their_published_size(model) -> None:
    assert parameter_count(model()) == PUBLISHED[model]


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model.__name__)
def test_what_is_no_matrix_product_is_the_lookup_the_vectors_and_idle_experts(model) -> None:
    config = model()
    vectors = (4 if config.post_norm else 2) * config.layers * config.embed + config.embed
    vectors += 2 * config.layers * config.head_dim if config.qk_norm else 0
    vectors += config.layers * (config.heads + 2 * config.kv_heads) * config.head_dim if config.qkv_bias else 0
    lookup = 0 if config.tie_embeddings else config.vocab * config.embed
    idle = 0 if config.moe is None else config.moe.experts - config.moe.active
    idle *= config.layers * 3 * config.embed * config.mlp
    assert parameter_count(config) - matmul_parameter_count(config) == vectors + lookup + idle


def test_flops_by_hand() -> None:
    block = 32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 48
    assert matmul_parameter_count(TINY) == 3 * block + 32 * 100
    assert flops_per_token(TINY, 20) == 6 * (3 * block + 32 * 100) + 12 * 3 * 4 * 16 * 20


def test_tying_changes_the_parameters_but_not_the_flops() -> None:
    tied = dataclasses.replace(TINY, tie_embeddings=True)
    assert parameter_count(TINY) - parameter_count(tied) == 32 * 100
    assert flops_per_token(TINY, 20) == flops_per_token(tied, 20)


def test_a_sliding_window_caps_the_keys() -> None:
    windowed = dataclasses.replace(TINY, sliding_window=8)
    assert flops_per_token(windowed, 20) == flops_per_token(TINY, 8)
    assert flops_per_token(windowed, 5) == flops_per_token(TINY, 5)


def test_global_layers_are_charged_for_all_keys() -> None:
    mixed = dataclasses.replace(TINY, sliding_window=8, global_every=2)  # of three layers, the second
    local, full = (flops_per_token(TINY, keys) for keys in (8, 20))
    assert flops_per_token(mixed, 20) == pytest.approx((2 * local + full) / 3)


def test_flops_of_llama_3_8b_are_six_a_weight_at_short_length() -> None:
    # 7.5e9 weights take part in products; at 8192 tokens attention adds 12 * 32 * 4096 * 8192.
    assert flops_per_token(models.llama3_8b(), 8192) == pytest.approx(6 * 7.504e9 + 12.88e9, rel=1e-3)


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(jax.devices("cpu")[0]) is None


@pytest.mark.parametrize("kind", ["NVIDIA H200 MIG 1g.18gb", "TPU v9", "tpu v4", ""])
def test_an_unlisted_chip_has_no_peak(kind: str) -> None:
    assert peak_flops(SimpleNamespace(device_kind=kind)) is None


def test_peaks_are_dense_and_per_device() -> None:
    peak = {kind: peak_flops(SimpleNamespace(device_kind=kind)) for kind in PEAK_FLOPS}
    assert peak["TPU v5 lite"] == 197e12
    assert peak["TPU v5"] == peak["TPU v5p"] == 459e12
    assert 2 * peak["TPU7x"] == 2307e12
    assert peak["NVIDIA H100 80GB HBM3"] == peak["NVIDIA H200"] == pytest.approx(989.4e12, rel=1e-3)
    assert all(1e13 < value < 1e16 for value in peak.values())
