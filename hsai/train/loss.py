"""Next-token cross-entropy over a vocabulary, in chunks: the logits of a whole batch never exist at once.

B batch, T query, D embed, V vocabulary, C positions in a chunk.
"""

import jax
import jax.numpy as jnp

from hsai.formats import Weight, project
from hsai.sharding import constrain


def cross_entropy_sum(
    hidden: jax.Array, head: Weight, targets: jax.Array, weights: jax.Array, *, chunk: int
) -> jax.Array:
    """The weighted sum of -log p(target) over all positions.

    Logits are made for C = `chunk` positions of every row at a time and made again in the backward pass, so memory
    holds (B, C, V) of them instead of (B, T, V).

    Args:
      hidden: (B, T, D) normalized hidden states, bfloat16 or float32.
      head: the weight (D, V) that projects to logits.
      targets: (B, T) int32 in [0, V).
      weights: (B, T) float32; 0 leaves a position out.
      chunk: positions of a row whose logits exist together; T is padded to a multiple of it.
    Returns: a float32 scalar, in nats.
    """
    # Collected over the axes of the batch once, not once a chunk; and so is its gradient, when all chunks are summed.
    head = jax.tree.map(lambda leaf: constrain(leaf, None, "vocab"), head)
    batch, length, _ = hidden.shape
    chunk = min(chunk, length)
    padding = -length % chunk

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def add(total: jax.Array, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden, targets, weights = part
        logits = project(hidden, head, out_axes=("batch", "seq", "vocab"), out_dtype=jnp.float32)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return total + jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - picked)), None

    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), (split(hidden), split(targets), split(weights)))
    return total
