"""Linear + cross-entropy in plain jax.numpy: the meaning of the kernel, and the yardstick of every backend.

It materialises the logits, (..., T, V) float32.

Dimensions: T tokens, D embed, V vocabulary.
"""

import jax
import jax.numpy as jnp

from hsai_kernels.ops.cross_entropy.vocabulary import collect_vocabulary


def cross_entropy_reference(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    *,
    softcap: float | None,
    z_loss: float,
    chunk: int | None,
    split: tuple[str, ...] = (),
) -> jax.Array:
    """float32 (..., T); arguments as in api.py, already validated, targets in [0, V). `chunk` means nothing here."""
    del chunk
    w = collect_vocabulary(w, split)
    logits = jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_sum - picked + z_loss * jnp.square(log_sum)


def cross_entropy_sum_reference(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    softcap: float | None,
    z_loss: float,
    chunk: int | None,
    split: tuple[str, ...] = (),
) -> jax.Array:
    """float32 scalar: the losses, weighted and summed."""
    losses = cross_entropy_reference(x, w, targets, softcap=softcap, z_loss=z_loss, chunk=chunk, split=split)
    return jnp.sum(weights * losses)
