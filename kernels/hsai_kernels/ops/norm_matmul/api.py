"""`norm_matmul`: RMS normalization and the projection behind it, whose normalized activations need not be stored.

Dimensions: D contraction, F outputs.
"""

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import load_later, run_kernel
from hsai_kernels.ops.norm_matmul.reference import norm_matmul_reference
from hsai_kernels.ops.quantized_matmul.api import check_activations
from hsai_kernels.options import check_normal

BACKENDS = {
    "tpu": load_later("hsai_kernels.ops.norm_matmul.tpu", "norm_matmul_tpu"),
    "reference": norm_matmul_reference,
}


def norm_matmul(
    x: jax.Array, gain: jax.Array, w: jax.Array, *, eps: float, implementation: str | None = None
) -> jax.Array:
    """(x / sqrt(mean(x**2) + eps) * gain) @ w (RMSNorm: Zhang and Sennrich, 1910.07467, eq. 4).

    Normalized in float32, then rounded to x's dtype, as is the weight; products are summed in float32. Differentiable
    in x, gain and w by reverse mode. Several projections of one x are one of their weights side by side.

    Args:
      x: (..., D), float32 or bfloat16.
      gain: (D,), floating.
      w: (D, F), floating.
      eps: keeps a row of zeros from dividing by zero; positive and normal in float32.
      implementation: "reference", "tpu" (Pallas; its gradient is the reference's), or None for the platform's best.

    Returns:
      (..., F) in x's dtype.

    Raises:
      ValueError: shapes, dtypes or options that do not fit together.
      NotImplementedError: the implementation was named and does not support this call.
    """
    check_activations("norm_matmul", x)
    if w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"norm_matmul needs w ({x.shape[-1]}, F) for x of shape {x.shape}, got {w.shape}")
    if gain.shape != x.shape[-1:]:
        raise ValueError(f"gain has shape {gain.shape}, x needs {x.shape[-1:]}")
    for name, array in (("gain", gain), ("w", w)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got {array.dtype}")
    check_normal("eps", eps)
    return run_kernel("norm_matmul", BACKENDS, implementation, x, gain, w, eps=eps)
