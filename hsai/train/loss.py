"""Next-token cross-entropy over a vocabulary, in chunks: the logits of a whole batch never exist at once.

B batch, T query, D embed, V vocabulary, C positions in a chunk.
"""

import jax

from hsai.formats import Weight, dense_operands
from hsai.sharding import constrain
from hsai_kernels import cross_entropy_sum as sum_losses


def cross_entropy_sum(
    hidden: jax.Array, head: Weight, targets: jax.Array, weights: jax.Array, *, chunk: int
) -> jax.Array:
    """The weighted sum of -log p(target) over all positions.

    Logits are made for C = `chunk` positions of every row at a time, and their gradient with them, so memory holds
    (B, C, V) of them instead of (B, T, V).

    Args:
      hidden: (B, T, D) normalized hidden states, bfloat16 or float32.
      head: the weight (D, V) that projects to logits.
      targets: (B, T) int32 in [0, V).
      weights: (B, T) float32; 0 leaves a position out.
      chunk: positions of a row whose logits exist together; T is padded to a multiple of it.
    Returns: a float32 scalar, in nats; NaN if a position that counts has a target outside of the vocabulary.
    """
    # Collected over the axes of the batch once, not once a chunk; and so is its gradient, when all chunks are summed.
    head = jax.tree.map(lambda leaf: constrain(leaf, None, "vocab"), head)
    hidden, dense = dense_operands(constrain(hidden, "batch", "seq", "embed"), head)
    return sum_losses(hidden, dense, targets, weights, chunk=chunk)
