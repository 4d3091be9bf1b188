"""hsai_kernels: attention, products with packed weights, fused layers: one signature each, several backends.

It takes raw arrays, imports nothing from hsai, and can be used alone. `ops/` has a folder a kernel (api, reference,
backends, the shapes its tests run over), `packing.py` the one rule of how small integers share a word, `dispatch.py`
the only branch on the platform, `native.py` the door to the C++ kernels.
"""

from hsai_kernels.dispatch import prefer
from hsai_kernels.ops.attention.api import attention
from hsai_kernels.ops.attention.reference import pack_halves, unpack_halves
from hsai_kernels.ops.cross_entropy.api import cross_entropy, cross_entropy_sum
from hsai_kernels.ops.gated_mlp.api import gated_mlp
from hsai_kernels.ops.norm_matmul.api import norm_matmul
from hsai_kernels.ops.paged_attention.api import paged_attention
from hsai_kernels.ops.quantized_matmul.api import quantized_matmul, quantized_matmuls
from hsai_kernels.ops.quantized_matmul.reference import dequantize_int8, dequantize_words, find_zero
from hsai_kernels.ops.rope.api import rope
from hsai_kernels.ops.sparse_matmul.api import sparse_matmul, sparse_matmuls
from hsai_kernels.ops.sparse_matmul.reference import (
    POSITION_BITS,
    densify_bits,
    densify_nm,
    rank_chosen,
    unpack_bits,
)
from hsai_kernels.packing import count_elements, pack_words, unpack_words

__all__ = [
    "POSITION_BITS",
    "attention",
    "count_elements",
    "cross_entropy",
    "cross_entropy_sum",
    "densify_bits",
    "densify_nm",
    "dequantize_int8",
    "dequantize_words",
    "find_zero",
    "gated_mlp",
    "norm_matmul",
    "pack_halves",
    "pack_words",
    "paged_attention",
    "prefer",
    "quantized_matmul",
    "quantized_matmuls",
    "rank_chosen",
    "rope",
    "sparse_matmul",
    "sparse_matmuls",
    "unpack_bits",
    "unpack_halves",
    "unpack_words",
]
