"""The block formats of ggml: what the bytes of a GGUF tensor stand for, as float32.

A block holds 32 or 256 numbers of a row: small integers, and the scale (and offset) that turns them into numbers. The
layouts are those of ggml-common.h; each is tested bit for bit against `gguf.quants`.

N blocks of a batch.
"""

from collections.abc import Callable

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

Type = GGMLQuantizationType

BATCH = 1 << 14
"""Blocks at a time: intermediates stay in a cache, and small beside the tensor."""


def dequantize(kind: GGMLQuantizationType, data: np.ndarray) -> np.ndarray:
    """uint8 (bytes,), a whole number of blocks -> float32 (numbers,); scales that are no numbers make such numbers."""
    size, nbytes = GGML_QUANT_SIZES[kind]
    if size == 1:
        return DEQUANTIZERS[kind](data)
    blocks = data.reshape(-1, nbytes)
    numbers = np.empty((len(blocks), size), np.float32)
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), BATCH):
            numbers[start : start + BATCH] = DEQUANTIZERS[kind](blocks[start : start + BATCH])
    return numbers.reshape(-1)


def quantize(kind: GGMLQuantizationType, tensor: np.ndarray) -> np.ndarray:
    """float32 (..., row) -> uint8 (bytes,), rounded as ggml rounds; a row is a whole number of blocks."""
    return quants.quantize(np.ascontiguousarray(tensor, np.float32), kind).reshape(-1).view(np.uint8)


def join_q4_1(codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """Q4_1 of codes that are there already, with nothing rounded: the inverse of what `dequantize` takes apart.

    Args:
      codes: uint8 (..., row), at most 15; a row is a whole number of blocks.
      scale, minimum: float16 (..., row / 32): a number is code * scale + minimum.
    Returns: uint8 (bytes,).
    """
    blocks = codes.reshape(-1, 32)
    numbers = np.stack([scale.reshape(-1), minimum.reshape(-1)], axis=1).astype("<f2").view(np.uint8)
    return np.concatenate([numbers, blocks[:, :16] | blocks[:, 16:] << 4], axis=1).reshape(-1)


def _floats(data: np.ndarray) -> np.ndarray:
    return data.view("<f4").astype(np.float32, copy=False)


def _halves(data: np.ndarray) -> np.ndarray:
    return data.view("<f2").astype(np.float32)


def _bfloats(data: np.ndarray) -> np.ndarray:
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _scale(blocks: np.ndarray, at: int) -> np.ndarray:
    """float32 (N, 1): the float16 at byte `at` of each block."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 (N, P) -> (N, 2 P): the low halves of all bytes, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _scale(blocks, 0)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return (_nibbles(blocks[:, 2:]).astype(np.int8) - np.int8(8)).astype(np.float32) * _scale(blocks, 0)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _nibbles(blocks[:, 4:]).astype(np.float32) * _scale(blocks, 0) + _scale(blocks, 2)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    fifth = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    integers = (_nibbles(blocks[:, 6:]) | fifth << 4).astype(np.int8) - np.int8(16)
    return integers.astype(np.float32) * _scale(blocks, 0)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """256 numbers in 8 groups; a group's scale and offset have 6 bits each, and the block has a scale for either."""
    packed = blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1).astype(np.float32)
    offsets = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1).astype(np.float32)
    pairs = blocks[:, 16:].reshape(-1, 4, 1, 32)
    integers = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)
    scales, offsets = scales * _scale(blocks, 0), offsets * _scale(blocks, 2)
    return (integers.astype(np.float32) * scales[:, :, None] - offsets[:, :, None]).reshape(-1, 256)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """256 numbers in 16 groups with scales of 8 bits; four low bits of a number in one place, two high in another."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    integers = (low | high << 4).astype(np.int8).reshape(-1, 16, 16) - np.int8(32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32) * _scale(blocks, 208)
    return (integers.astype(np.float32) * scales[:, :, None]).reshape(-1, 256)


DEQUANTIZERS: dict[GGMLQuantizationType, Callable[[np.ndarray], np.ndarray]] = {
    Type.F32: _floats,
    Type.F16: _halves,
    Type.BF16: _bfloats,
    Type.Q8_0: _q8_0,
    Type.Q4_0: _q4_0,
    Type.Q4_1: _q4_1,
    Type.Q5_0: _q5_0,
    Type.Q4_K: _q4_k,
    Type.Q6_K: _q6_k,
}
"""From uint8 (N, bytes of a block) to float32 (N, numbers of a block); for plain numbers, from and to one axis."""
