"""`sparse_matmul`: activations times a weight that keeps n of every m = 4 elements along the contraction.

Dimensions: D contraction, F output, C = D*n/m kept elements a column, g dense positions that share a scale.
"""

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import Backend, run_kernel
from hsai_kernels.ops.quantized_matmul.api import check_activation_bits, check_activations, check_scale
from hsai_kernels.ops.sparse_matmul.cpu import sparse_matmul_cpu
from hsai_kernels.ops.sparse_matmul.gpu import sparse_matmul_gpu
from hsai_kernels.ops.sparse_matmul.reference import sparse_matmul_reference
from hsai_kernels.ops.sparse_matmul.tpu import sparse_matmul_tpu

BACKENDS: dict[str, Backend] = {
    "cpu": sparse_matmul_cpu,
    "gpu": sparse_matmul_gpu,
    "reference": sparse_matmul_reference,
    "tpu": sparse_matmul_tpu,
}


def sparse_matmul(
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    scale: jax.Array | None = None,
    *,
    n: int,
    m: int,
    activation_bits: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """x @ w, where w keeps n of every m consecutive elements of a column (N:M sparsity, Mishra et al. 2104.08378).

    Differentiable by reverse mode in x, in floating values and in scale; integers have no gradient.

    Args:
      x: (..., D), float32 or bfloat16.
      values: float32 or bfloat16 (C, F), or uint32 (C/8, F) holding 4-bit integers in offset binary (value + 8).
        Kept element c of a column belongs to its sparsity group c // n.
      indices: uint32 (C/16, F): the 2-bit position of every kept element inside its group, ascending inside a group.
      scale: (D/g, F) float32 or bfloat16 for int4 words, where g counts dense positions and is a multiple of m;
        None for floating values.
      n, m: kept elements and positions a group: m = 4, n = 1, 2 or 3.
      activation_bits: None takes activations as they are, 8 rounds them first, as in quantized_matmul; for int4 words.
      implementation: "reference", "cpu" (native), "gpu" (Pallas Triton), "tpu" (Mosaic), or None for the platform's
        best.

    Returns:
      (..., F) in x's dtype, accumulated in float32.

    Raises:
      ValueError: shapes or dtypes that do not fit together, naming both; unknown implementation.
      NotImplementedError: the implementation was named and does not support this call.
    """
    check_activations("sparse_matmul", x)
    if m != 4:
        raise ValueError(f"m={m} is not supported: only m=4 now")
    if n not in (1, 2, 3):
        raise ValueError(f"n={n} of m=4 is not supported: valid are 1, 2, 3")
    if values.ndim != 2 or indices.ndim != 2:
        raise ValueError(f"sparse_matmul needs values and indices (rows, F), got {values.shape} and {indices.shape}")
    packed = values.dtype == jnp.uint32
    if not packed and values.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"sparse_matmul has values of float32 or bfloat16, or of uint32 (int4 words), not of {values.dtype}"
        )
    kept = values.shape[0] * (8 if packed else 1)
    if x.shape[-1] * n != kept * m:
        raise ValueError(f"x contracts over {x.shape[-1]}, but {kept} kept elements ({n}:{m}) make {kept * m / n:g}")
    if indices.dtype != jnp.uint32:
        raise ValueError(f"indices are uint32 words, not {indices.dtype}")
    if indices.shape[0] * 16 != kept:
        raise ValueError(f"indices hold {indices.shape[0] * 16} positions a column, values {kept}")
    if indices.shape[1] != values.shape[1]:
        raise ValueError(f"indices have {indices.shape[1]} columns, values have {values.shape[1]}")
    if packed != (scale is not None):
        raise ValueError(f"values of {values.dtype} {'need' if packed else 'take no'} scale")
    if scale is not None:
        check_scale(scale, x.shape[-1], values.shape[1])
        if x.shape[-1] // scale.shape[0] % m:
            raise ValueError(f"scale groups of {x.shape[-1] // scale.shape[0]} positions are no multiple of m={m}")
    check_activation_bits(activation_bits)
    if activation_bits is not None and not packed:
        raise ValueError(f"activation_bits={activation_bits} is for int4 words, not for values of {values.dtype}")
    options = {"n": n, "m": m, "activation_bits": activation_bits}
    return run_kernel("sparse_matmul", BACKENDS, implementation, x, values, indices, scale, **options)
