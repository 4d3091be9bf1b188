"""One training step: loss, gradient (accumulated over micro-batches), update, and what to log about it.

A accumulations, B batch, T query.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hsai.data.packing import Batch
from hsai.models import Remat, Transformer
from hsai.train.loss import cross_entropy_sum
from hsai.train.sparsity import SparsityConfig, sparsify
from hsai.train.state import TrainState

if TYPE_CHECKING:
    from hsai.train.loop import TrainConfig

Metrics = dict[str, jax.Array]


class BatchSums(NamedTuple):
    """What a batch amounts to, float32 (), to be added up over batches and divided by the number of targets."""

    loss: jax.Array
    """-log p of the targets, in nats."""

    targets: jax.Array
    """Their weight."""

    imbalance: jax.Array
    """`MoE.imbalance`, the mean over layers, times `targets`; 0 without experts."""


# What is minimized, summed; what it comes from; and its gradient in the model's own structure.
Sums = tuple[tuple[jax.Array, BatchSums], Transformer]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def batch_loss(
    model: Transformer,
    batch: Batch,
    *,
    chunk: int,
    remat: Remat = "none",
    sparsity: SparsityConfig | None = None,
    expert_balance: float = 0.0,
) -> tuple[jax.Array, BatchSums]:
    """What training minimizes, summed over the targets: -log p, and the imbalance of each layer's experts by weight."""
    count = jnp.sum(batch.weights)
    if sparsity is not None:
        model = sparsify(model, sparsity, gradient_scale=count)
    hidden, imbalances = model.read_counted(
        batch.tokens, batch.weights, positions=batch.positions, segments=batch.segments, remat=remat
    )
    loss = cross_entropy_sum(hidden, model.head.get_value(), batch.targets, batch.weights, chunk=chunk)
    if imbalances is None:
        return loss, BatchSums(loss, count, jnp.zeros((), jnp.float32))
    sums = BatchSums(loss, count, count * jnp.mean(imbalances))
    return loss + expert_balance * count * jnp.sum(imbalances), sums


def split_batch(batch: Batch, parts: int) -> Batch:
    """(B, T) -> (A, B / A, T), each part taking every A-th row: rows stay on the device that holds them."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), batch)


def make_train_step(
    optimizer: optax.GradientTransformation, schedule: optax.Schedule, config: "TrainConfig", shardings: TrainState
) -> TrainStep:
    """The step function, compiled at its first call; it takes over the memory of the state that it is given.

    `shardings` are those of the state, before the step and after it: were they left to the compiler, the second step
    could meet others than the first, and would be compiled again.

    The gradient is that of the mean over all targets of the batch, whatever `config.accumulate` is; but experts are
    balanced over each micro-batch. Metrics are float32 scalars: loss (nats a token, of the targets alone), grad_norm
    before clipping, update_norm, learning_rate, tokens; and of a model with experts expert_imbalance.
    """

    def loss_and_grad(model: Transformer, batch: Batch) -> Sums:
        def loss(model: Transformer) -> tuple[jax.Array, BatchSums]:
            return batch_loss(
                model,
                batch,
                chunk=config.loss_chunk,
                remat=config.remat,
                sparsity=config.sparsity,
                expert_balance=config.expert_balance,
            )

        return jax.value_and_grad(loss, has_aux=True)(model)

    def accumulate(model: Transformer, batch: Batch) -> Sums:
        def add(total: Sums, part: Batch) -> tuple[Sums, None]:
            return jax.tree.map(jnp.add, total, loss_and_grad(model, part)), None

        zero = jnp.zeros((), jnp.float32)
        start = ((zero, BatchSums(zero, zero, zero)), jax.tree.map(jnp.zeros_like, model))
        return jax.lax.scan(add, start, split_batch(batch, config.accumulate))[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        compute = loss_and_grad if config.accumulate == 1 else accumulate
        (_, sums), grads = compute(state.model, batch)
        grads = jax.tree.map(lambda g: g / sums.targets, grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.model)
        metrics = {
            "loss": sums.loss / sums.targets,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": sums.targets,
        }
        if state.model.config.moe is not None:
            metrics["expert_imbalance"] = sums.imbalance / sums.targets
        model = optax.apply_updates(state.model, updates)
        return TrainState(state.step + 1, model, optimizer_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
