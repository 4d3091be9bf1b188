"""The block formats against gguf-py's own numbers, bit for bit."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from hsai.interop import gguf_blocks
from hsai.interop.gguf_blocks import DEQUANTIZERS, dequantize, quantize

Type = GGMLQuantizationType
# Where each block keeps its float16 scales.
SCALES = {Type.Q8_0: [0], Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q4_K: [0, 2], Type.Q6_K: [208]}
HALVES = np.array([0.0, -0.0, 6e-8, 65504, -65504, np.inf, -np.inf, np.nan, 1.0, -1 / 3], np.float16)


def test_these_types_are_read() -> None:
    assert {kind.name for kind in DEQUANTIZERS} == set("F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q4_K Q6_K".split())


def random_blocks(kind: GGMLQuantizationType, count: int, seed: int = 0) -> np.ndarray:
    """Random bytes; every second block has a scale from `HALVES`, the others an ordinary one."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, GGML_QUANT_SIZES[kind][1]), np.uint8)
    for at in SCALES.get(kind, []):
        scales = np.where(
            np.arange(count) % 2, rng.choice(HALVES, count), rng.standard_normal(count).astype(np.float16)
        ).astype(np.float16)
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    return blocks


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """NaN is NaN, whatever its payload; anything else, zeros of either sign too, has equal bits."""
    both = np.isnan(left) & np.isnan(right)
    return bool(np.all(both | (left.view(np.uint32) == right.view(np.uint32))))


@pytest.mark.parametrize("kind", DEQUANTIZERS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("count", [1, 7, 500])
def test_same_numbers_as_gguf(kind: GGMLQuantizationType, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_blocks, "BATCH", 64)
    blocks = random_blocks(kind, count)
    with np.errstate(all="ignore"):
        wanted = quants.dequantize(blocks, kind).reshape(-1)
    found = dequantize(kind, blocks.reshape(-1))
    assert found.dtype == np.float32 and found.shape == (count * GGML_QUANT_SIZES[kind][0],)
    assert same_bits(found, wanted)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0], ids=lambda kind: kind.name)
def test_what_is_quantized_again_is_the_same(kind: GGMLQuantizationType) -> None:
    tensor = np.random.default_rng(1).standard_normal((6, 96)).astype(np.float32)
    once = dequantize(kind, quantize(kind, tensor))
    assert np.array_equal(dequantize(kind, quantize(kind, once.reshape(6, 96))), once)
    bits = {Type.F32: 0, Type.F16: 2**-11, Type.BF16: 2**-8, Type.Q8_0: 2**-7.9, Type.Q4_0: 2**-2.9}[kind]
    largest = np.abs(tensor).max() if kind in (Type.Q8_0, Type.Q4_0) else np.abs(tensor.reshape(-1))
    assert np.all(np.abs(once - tensor.reshape(-1)) <= bits * largest)
