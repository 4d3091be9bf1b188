"""`gated_mlp`: the gated feed-forward block, whose hidden activations need not be stored.

Dimensions: D embed, F ffn.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import load_later, run_kernel
from hsai_kernels.ops.gated_mlp.reference import ACTIVATIONS, gated_mlp_reference
from hsai_kernels.ops.quantized_matmul.api import check_activations

BACKENDS = {"tpu": load_later("hsai_kernels.ops.gated_mlp.tpu", "gated_mlp_tpu"), "reference": gated_mlp_reference}


def gated_mlp(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: Literal["silu", "gelu"] = "silu",
    implementation: str | None = None,
) -> jax.Array:
    """(activation(x @ gate) * (x @ up)) @ down: SwiGLU and GeGLU (Shazeer, 2002.05202, eq. 6).

    Weights are rounded to x's dtype, and so is the product of gate and up; all sums and the activation are float32.
    Differentiable in all four by reverse mode.

    Args:
      x: (..., D), float32 or bfloat16.
      gate, up: (D, F), floating.
      down: (F, D), floating.
      activation: "silu", or "gelu" in its tanh form.
      implementation: "reference", "tpu" (Pallas; its gradient is the reference's), or None for the platform's best.

    Returns:
      (..., D) in x's dtype.

    Raises:
      ValueError: shapes, dtypes or options that do not fit together.
      NotImplementedError: the implementation was named and does not support this call.
    """
    check_activations("gated_mlp", x)
    if gate.ndim != 2 or gate.shape[0] != x.shape[-1]:
        raise ValueError(f"gated_mlp needs gate ({x.shape[-1]}, F) for x of shape {x.shape}, got {gate.shape}")
    for name, array, shape in (("up", up, gate.shape), ("down", down, gate.shape[::-1])):
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, gate of {gate.shape} needs {shape}")
    for name, array in (("gate", gate), ("up", up), ("down", down)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got {array.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: valid are {', '.join(ACTIVATIONS)}")
    return run_kernel("gated_mlp", BACKENDS, implementation, x, gate, up, down, activation=activation)
