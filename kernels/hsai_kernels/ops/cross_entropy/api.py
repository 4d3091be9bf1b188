"""`cross_entropy`: a projection to logits and the cross-entropy of them, whose logits need never exist at once.

`cross_entropy_sum` is the same, weighted and summed. It is for training: where nothing else is asked for, the gradients
can be made while the logits are there, for 3 products instead of 4.

For a vocabulary of 128,256 and 8,192 tokens the logits are 4.2 GB of float32, and their gradient as much again: more
than the model's own activations. All that training wants of them is two numbers a token.

Dimensions: T tokens, D embed, V vocabulary.
"""

import jax
import jax.numpy as jnp

from hsai_kernels.dispatch import load_later, run_kernel
from hsai_kernels.ops.cross_entropy.chunked import cross_entropy_chunked
from hsai_kernels.ops.cross_entropy.reference import cross_entropy_reference, cross_entropy_sum_reference
from hsai_kernels.ops.cross_entropy.summed import cross_entropy_sum_chunked
from hsai_kernels.ops.cross_entropy.vocabulary import count_parts
from hsai_kernels.options import LARGEST, check_count, check_softcap

BACKENDS = {
    "tpu": load_later("hsai_kernels.ops.cross_entropy.tpu", "cross_entropy_tpu"),
    "chunked": cross_entropy_chunked,
    "reference": cross_entropy_reference,
}

SUM_BACKENDS = {
    "tpu": load_later("hsai_kernels.ops.cross_entropy.tpu", "cross_entropy_sum_tpu"),
    "chunked": cross_entropy_sum_chunked,
    "reference": cross_entropy_sum_reference,
}


def cross_entropy(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
    split: tuple[str, ...] = (),
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
      split: inside of jax.shard_map, the mesh axes that the vocabulary is split over, outermost first: w is then this
        device's part of it, V words of V * devices that targets name. Each of these devices gets the whole loss, the
        whole gradient of x, and that of its part of w.
      implementation: "reference", "chunked" (memory linear in T and in V, its gradient's too), "tpu" (Pallas), or
        None for the platform's best.

    Returns:
      (..., T) float32.

    Raises:
      ValueError: shapes, dtypes or options that do not fit together.
      NotImplementedError: the implementation was named and does not support this call.
    """
    targets, valid = _check(x, w, targets, softcap, z_loss, chunk, split)
    options = {"softcap": softcap, "z_loss": float(z_loss), "chunk": chunk, "split": split}
    loss = run_kernel("cross_entropy", BACKENDS, implementation, x, w, targets, **options)
    return jnp.where(valid, loss, jnp.nan)


def cross_entropy_sum(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
    split: tuple[str, ...] = (),
    implementation: str | None = None,
) -> jax.Array:
    """The sum of weights * cross_entropy(x, w, targets) over all tokens; differentiable in x, w and weights.

    Arguments, precision and errors are those of `cross_entropy`, and:
      weights: (..., T) float32. A token of weight 0 is left out, whatever its target is.
      chunk: logits of this many tokens of axis T exist together, over the whole vocabulary.

    Returns:
      A float32 scalar; NaN, with gradients of NaN, if a token that counts has a target outside of [0, V).
    """
    targets, valid = _check(x, w, targets, softcap, z_loss, chunk, split)
    if weights.shape != targets.shape or weights.dtype != jnp.float32:
        raise ValueError(f"weights are {weights.dtype} {weights.shape}, must be float32 {targets.shape}")
    options = {"softcap": softcap, "z_loss": float(z_loss), "chunk": chunk, "split": split}
    # By way of the weights, since a question about all tokens would be one more exchange between devices.
    weights = jnp.where(valid | (weights == 0.0), weights, jnp.nan)
    return run_kernel("cross_entropy_sum", SUM_BACKENDS, implementation, x, w, targets, weights, **options)


def _check(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    softcap: float | None,
    z_loss: float,
    chunk: int | None,
    split: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """Targets (int32) that are all in the vocabulary, and which of them were; ValueError for what does not fit."""
    _check_operands(x, w, targets)
    check_softcap(softcap)
    check_count("chunk", chunk)
    if not 0.0 <= z_loss <= LARGEST:
        raise ValueError(f"z_loss={z_loss} must be at least 0, and finite in float32")
    safe = jnp.clip(targets, 0, w.shape[1] * count_parts(split) - 1).astype(jnp.int32)
    return safe, safe == targets


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
