"""Next-token cross-entropy over a vocabulary, in chunks: the logits of a whole batch never exist at once.

On a mesh each device has its rows of the batch and its part of the vocabulary, and the kernels of one device. Devices
that hold the same rows exchange two numbers a token, the logarithm of their part's sum and the logit of the target, and
add up the gradient of the hidden states (vocabulary-parallel cross-entropy: Shoeybi et al., Megatron-LM, 1909.08053).

B batch, T query, D embed, V vocabulary, C positions in a chunk.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hsai.formats import Weight, dense_operands
from hsai.sharding import Axes, constrain
from hsai.shards import Splits, add_parts, find_splits, map_shards
from hsai_kernels import cross_entropy_sum as sum_losses

HIDDEN: Axes = ("batch", "seq", None)
ROWS: Axes = ("batch", "seq")
HEAD: Axes = ("embed", "vocab")
Gradients = tuple[jax.Array, jax.Array, jax.Array]
"""Of hidden, head and weights."""


class BatchSums(NamedTuple):
    """What a batch amounts to, float32 (), to be added up over batches and divided by the number of targets."""

    loss: jax.Array
    """-log p of the targets, in nats."""

    targets: jax.Array
    """Their weight."""

    imbalance: jax.Array
    """`MoE.imbalance`, the mean over layers, times `targets`; 0 without experts."""


def finish_loss(
    loss: jax.Array, count: jax.Array, imbalances: jax.Array | None, expert_balance: float
) -> tuple[jax.Array, BatchSums]:
    """The summed loss with the imbalance of each layer's experts, float32 (L,) or None, by its weight; and the sums."""
    if imbalances is None:
        return loss, BatchSums(loss, count, jnp.zeros((), jnp.float32))
    sums = BatchSums(loss, count, count * jnp.mean(imbalances))
    return loss + expert_balance * count * jnp.sum(imbalances), sums


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
    hidden, dense = dense_operands(constrain(hidden, "batch", "seq", "embed"), head)
    return _sum(chunk, hidden, dense, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(chunk: int, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    splits = split_loss(hidden, head)

    def compute(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        whole = collect_head(head, hidden.dtype, splits["embed"])
        loss = sum_losses(hidden, whole, targets, weights, chunk=chunk, split=splits["vocab"])
        return add_parts(loss, splits["batch"] + splits["seq"])

    loss: jax.Array = map_shards(compute, splits, (HIDDEN, HEAD, ROWS, ROWS), ())(hidden, head, targets, weights)
    return loss


def _sum_forward(
    chunk: int, hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, Gradients]:
    """The sum and its gradients.

    They are made where the parts are, so that each is added up once, over just the devices that have parts of it, in
    float32: jax's transposition of the sum would round that of bfloat16 operands first.
    """
    splits = split_loss(hidden, head)
    rows = splits["batch"] + splits["seq"]

    def compute(
        hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        def lose(hidden: jax.Array, whole: jax.Array, weights: jax.Array) -> jax.Array:
            return sum_losses(hidden, whole, targets, weights, chunk=chunk, split=splits["vocab"])

        loss, pull = jax.vjp(lose, hidden, collect_head(head, hidden.dtype, splits["embed"]), weights)
        d_hidden, d_whole, d_weights = pull(jnp.ones((), jnp.float32))
        d_head = scatter_head(d_whole, splits["embed"])
        d_head = add_parts(d_head, [name for name in rows if name not in splits["embed"]])
        return add_parts(loss, rows), d_hidden, d_head.astype(head.dtype), d_weights

    out_axes = ((), HIDDEN, HEAD, ROWS)
    results = map_shards(compute, splits, (HIDDEN, HEAD, ROWS, ROWS), out_axes)(hidden, head, targets, weights)
    return results[0], results[1:]


def _sum_backward(chunk: int, saved: Gradients, grad: jax.Array) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    d_hidden, d_head, d_weights = ((grad * gradient).astype(gradient.dtype) for gradient in saved)
    return d_hidden, d_head, None, d_weights


_sum.defvjp(_sum_forward, _sum_backward)


def split_loss(hidden: jax.Array, head: jax.Array) -> Splits:
    """How the mesh splits batch, seq and vocab; and embed, of the head alone, over devices that have other rows.

    They store it in parts, which are collected to be multiplied by; of the gradient, too, each keeps its part.
    """
    splits = find_splits((HIDDEN, hidden), ((None, "vocab"), head))
    stored = find_splits((HEAD, head))["embed"]
    return {**splits, "embed": tuple(name for name in stored if name in splits["batch"] + splits["seq"])}


def collect_head(head: jax.Array, dtype: jnp.dtype, names: tuple[str, ...]) -> jax.Array:
    """(D / devices, V) -> (D, V) over mesh axes `names`: rounded to the products' dtype before it is sent, then in the
    head's own again, so that its gradient is float32; nothing is computed twice, for the product's rounding is none."""
    if not names:
        return head
    return jax.lax.all_gather(head.astype(dtype), names, axis=0, tiled=True).astype(head.dtype)


def scatter_head(gradient: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """(D, V) -> (D / devices, V) over mesh axes `names`: the sum over the devices, of which each keeps its part."""
    if not names:
        return gradient
    return jax.lax.psum_scatter(gradient.astype(jnp.float32), names, scatter_dimension=0, tiled=True)
