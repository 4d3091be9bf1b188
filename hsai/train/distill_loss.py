"""Cross-entropy with the text and KL divergence from a teacher, over a vocabulary, in chunks.

For logits z of the student with p = softmax(z), and q = softmax of the teacher's, the loss of a position is

    (1 - share) * -log p[target] + share * sum(q * (log q - log p)),

whose gradient by z is p - (1 - share) * onehot(target) - share * q. As in `hsai.train.loss`, it is made while the
logits of a chunk are there, so that neither model's exist for a whole batch; and on a mesh each device has its rows and
its part of the vocabulary.

B batch, T query, D embed, E embed of the teacher, V vocabulary, C positions in a chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from hsai.formats import Weight, dense_operands
from hsai.sharding import Axes, constrain
from hsai.shards import add_parts, map_shards
from hsai.train.loss import HEAD, HIDDEN, ROWS, collect_head, scatter_head, split_loss

TEACHER_HEAD: Axes = (None, "vocab")
Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def distillation_sum(
    hidden: jax.Array,
    head: Weight,
    teacher_hidden: jax.Array,
    teacher_head: Weight,
    targets: jax.Array,
    weights: jax.Array,
    *,
    share: float,
    chunk: int,
) -> jax.Array:
    """The weighted sum over all positions of the loss above, differentiable in `hidden` and `head`.

    Args:
      hidden: (B, T, D) normalized hidden states of the student, bfloat16 or float32.
      head: the student's weight (D, V) that projects to logits.
      teacher_hidden: (B, T, E), and
      teacher_head: (E, V), of the teacher; nothing flows back to them.
      targets: (B, T) int32 in [0, V).
      weights: (B, T) float32; 0 leaves a position out.
      share: of the divergence; in [0, 1].
      chunk: positions of a row whose logits exist together; T is padded to a multiple of it.
    Returns: a float32 scalar, in nats; NaN if a position that counts has a target outside of the vocabulary.
    """
    hidden, dense = dense_operands(constrain(hidden, "batch", "seq", "embed"), head)
    teacher_hidden, teacher_dense = dense_operands(constrain(teacher_hidden, "batch", "seq", "embed"), teacher_head)
    weights = jnp.where(((targets >= 0) & (targets < dense.shape[-1])) | (weights == 0), weights, jnp.nan)
    return _sum(share, chunk, hidden, dense, teacher_hidden, teacher_dense, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(share: float, chunk: int, *operands: Any) -> jax.Array:
    return _compute(share, chunk, operands)[0]


def _sum_forward(share: float, chunk: int, *operands: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    loss, d_hidden, d_head = _compute(share, chunk, operands)
    return loss, (d_hidden, d_head)


def _sum_backward(share: float, chunk: int, saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[Any, ...]:
    d_hidden, d_head = ((grad * gradient).astype(gradient.dtype) for gradient in saved)
    return d_hidden, d_head, None, None, None, None


_sum.defvjp(_sum_forward, _sum_backward)


def _compute(share: float, chunk: int, operands: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sum, and its gradients by hidden and head."""
    hidden, head, *_ = operands
    splits = split_loss(hidden, head)
    rows = splits["batch"] + splits["seq"]

    def compute(
        hidden: jax.Array,
        head: jax.Array,
        teacher_hidden: jax.Array,
        teacher_head: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        whole = collect_head(head, hidden.dtype, splits["embed"]).astype(hidden.dtype)
        theirs = teacher_head.astype(teacher_hidden.dtype)
        loss, d_hidden, d_whole = _sum_part(
            hidden, whole, teacher_hidden, theirs, targets, weights, share, chunk, splits["vocab"]
        )
        d_head = scatter_head(d_whole, splits["embed"])
        d_head = add_parts(d_head, [name for name in rows if name not in splits["embed"]])
        return add_parts(loss, rows), d_hidden, d_head.astype(head.dtype)

    in_axes = (HIDDEN, HEAD, HIDDEN, TEACHER_HEAD, ROWS, ROWS)
    results: tuple[jax.Array, jax.Array, jax.Array] = map_shards(compute, splits, in_axes, ((), HIDDEN, HEAD))(
        *operands
    )
    return results


def _sum_part(
    hidden: jax.Array,
    head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    share: float,
    chunk: int,
    split: tuple[str, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss (), gradients (B, T, D) and float32 (D, V / devices), of a device's rows and its part of the vocabulary.

    `split` are the mesh axes that the vocabulary is split over; the loss and the gradient of the hidden states are
    those of all of it.
    """
    length, vocab = hidden.shape[1], head.shape[-1]
    first = jax.lax.axis_index(split) * vocab if split else 0
    words = first + jnp.arange(vocab, dtype=jnp.int32)

    def cut(x: jax.Array) -> jax.Array:
        """(B, T, ...) -> (T / C, B, C, ...), padded behind."""
        padded = jnp.pad(x, ((0, 0), (0, -length % chunk), *((0, 0) for _ in x.shape[2:])))
        return jnp.swapaxes(padded.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 0, 1)

    def normalize(logits: jax.Array) -> jax.Array:
        """Logarithms of probabilities."""
        largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        largest = jax.lax.pmax(largest, split) if split else largest
        total = add_parts(jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True), split)
        return logits - largest - jnp.log(total)

    def step(sums: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        loss, d_head = sums
        x, t, target, weight = part
        log_p = normalize(jnp.matmul(x, head, preferred_element_type=jnp.float32))
        log_q = normalize(jnp.matmul(t, teacher_head, preferred_element_type=jnp.float32))
        q, hit = jnp.exp(log_q), target[..., None] == words
        wanted = share * q + jnp.where(hit, 1.0 - share, 0.0)
        # Of a target the logarithm of its probability; of the teacher's both, which sum to the divergence.
        each = add_parts(jnp.sum(share * q * log_q - wanted * log_p, axis=-1), split)
        d_logits = (weight[..., None] * (jnp.exp(log_p) - wanted)).astype(x.dtype)
        d_x = add_parts(jnp.matmul(d_logits, head.T, preferred_element_type=jnp.float32), split).astype(x.dtype)
        d_head = d_head + jnp.einsum("bcd,bcv->dv", x, d_logits, preferred_element_type=jnp.float32)
        # What counts for nothing stays out, be its loss infinite.
        return (loss + jnp.sum(jnp.where(weight == 0, 0.0, weight * each)), d_head), d_x

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32))
    (loss, d_head), d_hidden = jax.lax.scan(step, start, (cut(hidden), cut(teacher_hidden), cut(targets), cut(weights)))
    d_hidden = jnp.swapaxes(d_hidden, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])[:, :length]
    return loss, d_hidden, d_head
