"""One training step: loss, gradient (accumulated over micro-batches), update, and what to log about it.

A accumulations, B batch, T query.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from hsai.data.packing import Batch
from hsai.models import Remat, Transformer
from hsai.train.distill import distillation_loss
from hsai.train.formats import see_packed
from hsai.train.loss import BatchSums, cross_entropy_sum, finish_loss
from hsai.train.state import TrainState

if TYPE_CHECKING:
    from hsai.train.loop import TrainConfig

Metrics = dict[str, jax.Array]

# What is minimized, summed; what it comes from; and its gradient in the model's own structure.
Sums = tuple[tuple[jax.Array, BatchSums], Transformer]
TrainStep = Callable[..., tuple[TrainState, Metrics]]
"""Of a state, a batch and, where there is one, the teacher."""


def batch_loss(
    model: Transformer,
    batch: Batch,
    *,
    chunk: int,
    remat: Remat = "none",
    expert_balance: float = 0.0,
) -> tuple[jax.Array, BatchSums]:
    """What training minimizes, summed over the targets: -log p, and the imbalance of each layer's experts by weight."""
    count = jnp.sum(batch.weights)
    hidden, imbalances = model.read_counted(
        batch.tokens, batch.weights, positions=batch.positions, segments=batch.segments, remat=remat
    )
    loss = cross_entropy_sum(hidden, model.head.get_value(), batch.targets, batch.weights, chunk=chunk)
    return finish_loss(loss, count, imbalances, expert_balance)


def split_batch(batch: Batch, parts: int) -> Batch:
    """(B, T) -> (A, B / A, T), each part taking every A-th row: rows stay on the device that holds them."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), batch)


def make_train_step(
    optimizer: optax.GradientTransformation, schedule: optax.Schedule, config: "TrainConfig", shardings: TrainState
) -> TrainStep:
    """The step function, compiled at its first call; it takes over the memory of the state that it is given.

    It is called with the state, a batch and, for `config.distill`, the teacher.

    `shardings` are those of the state, before the step and after it: were they left to the compiler, the second step
    could meet others than the first, and would be compiled again.

    The gradient is that of the mean over all targets of the batch, whatever `config.accumulate` is; but experts are
    balanced over each micro-batch. Metrics are float32 scalars: loss (nats a token, of the targets alone), grad_norm
    before clipping, update_norm, learning_rate, tokens; and of a model with experts expert_imbalance.
    """

    def loss_and_grad(model: Transformer, batch: Batch, teacher: Transformer | None) -> Sums:
        def loss(model: Transformer) -> tuple[jax.Array, BatchSums]:
            how: dict[str, Any] = {
                "chunk": config.loss_chunk,
                "remat": config.remat,
                "expert_balance": config.expert_balance,
            }
            if config.distill is None:
                return batch_loss(model, batch, **how)
            assert teacher is not None
            return distillation_loss(model, teacher, batch, config.distill, **how)

        return jax.value_and_grad(loss, has_aux=True)(model)

    def accumulate(model: Transformer, batch: Batch, teacher: Transformer | None) -> Sums:
        def add(total: Sums, part: Batch) -> tuple[Sums, None]:
            return jax.tree.map(jnp.add, total, loss_and_grad(model, part, teacher)), None

        zero = jnp.zeros((), jnp.float32)
        start = ((zero, BatchSums(zero, zero, zero)), jax.tree.map(jnp.zeros_like, model))
        return jax.lax.scan(add, start, split_batch(batch, config.accumulate))[0]

    def step(state: TrainState, batch: Batch, teacher: Transformer | None = None) -> tuple[TrainState, Metrics]:
        compute = loss_and_grad if config.accumulate == 1 else accumulate
        # Once a step, however the batch is cut; and back by way of the mean's gradient, so that what formats add to it
        # (the pull on pruned weights) is the same for every batch.
        seen, pull_back = jax.vjp(lambda model: see_packed(model, config.formats), state.model)
        (_, sums), grads = compute(seen, batch, teacher)
        (grads,) = pull_back(jax.tree.map(lambda g: g / sums.targets, grads))
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
