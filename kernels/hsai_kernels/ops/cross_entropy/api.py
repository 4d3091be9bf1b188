"""`cross_entropy`: a projection to logits and the cross-entropy of them, whose logits need never exist at once.

For a vocabulary of 128,256 and 8,192 tokens the logits are 4.2 GB of float32, and their gradient as much again: more
than the model's own activations. All that training wants of them is two numbers a token.

Dimensions: T tokens, D embed, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import run_kernel
from hsai_kernels.ops.cross_entropy.chunked import cross_entropy_chunked
from hsai_kernels.ops.cross_entropy.reference import cross_entropy_reference
from hsai_kernels.ops.cross_entropy.tpu import cross_entropy_tpu

BACKENDS = {"tpu": cross_entropy_tpu, "chunked": cross_entropy_chunked, "reference": cross_entropy_reference}


def cross_entropy(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """-log softmax(x @ w)[target] of each token, in nats; differentiable in x and w by reverse mode.

    Logits and all that follows from them are float32. The weight is rounded to x's dtype before it is multiplied by,
    and so is the gradient of the logits; the weight's gradient is summed over tokens in float32.

    Args:
      x: (..., T, D), float32 or bfloat16. Leading dimensions are kept apart, so that they may be split over a mesh.
      w: (D, V), float32 or bfloat16.
      targets: (..., T) integers. One outside of [0, V) gives a loss of NaN, and no gradient.
      softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2, 2408.00118).
      z_loss: this many times log(sum(exp(logits)))**2 is added, which keeps logits near 0 (PaLM, 2204.02311, sec. 5).
      chunk: tokens of axis T whose logits exist together in the chunked backend; None for its own choice.
      implementation: "reference", "chunked" (memory linear in T and in V, its gradient's too), "tpu" (Pallas), or
        None for the platform's best.

    Returns:
      (..., T) float32.

    Raises:
      ValueError: shapes, dtypes or options that do not fit together.
      NotImplementedError: the implementation was named and does not support this call.
    """
    _check_operands(x, w, targets)
    for name, value in (("softcap", softcap), ("chunk", chunk)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} must be positive, or None")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss={z_loss} must be finite and at least 0")
    vocab = w.shape[1]
    options = {"softcap": softcap, "z_loss": float(z_loss), "chunk": chunk}
    safe = jnp.clip(targets, 0, vocab - 1).astype(jnp.int32)
    loss = run_kernel("cross_entropy", BACKENDS, implementation, x, w, safe, **options)
    return jnp.where(safe == targets, loss, jnp.nan)


def _check_operands(x: jax.Array, w: jax.Array, targets: jax.Array) -> None:
    """Raises ValueError unless x, w and targets fit together."""
    if x.ndim < 2:
        raise ValueError(f"cross_entropy needs x (..., T, D), got shape {x.shape}")
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"cross_entropy needs w (D, V) that is not empty, got shape {w.shape}")
    if x.shape[-1] != w.shape[0]:
        raise ValueError(f"x contracts over {x.shape[-1]}, w over {w.shape[0]}")
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"targets have shape {targets.shape}, x needs {x.shape[:-1]}")
    for name, array in (("x", x), ("w", w)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"cross_entropy has {name} of float32 or bfloat16, not of {array.dtype}")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must be integers, got {targets.dtype}")
