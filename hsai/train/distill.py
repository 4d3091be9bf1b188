"""Distillation: the loss of a student beside a teacher that reads the same tokens (1503.02531; SquareHead, 2310.06927).

The teacher computes in the same step, on the same mesh, and nothing flows back to it. It is no part of the state.

B batch, T query, D embed, L layers.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from hsai.data.packing import Batch
from hsai.errors import InputError
from hsai.formats import to_dense
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Remat, Transformer
from hsai.models.transformer import Block, abstract_transformer
from hsai.train.distill_loss import distillation_sum
from hsai.train.loss import BatchSums, finish_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Learns from what another model predicts, beside what the text says."""

    teacher: Path
    """A run, a bundle, a checkpoint or a GGUF file, with the tokenizer of the run."""

    share: float = 0.5
    """Of KL(teacher || student) in the loss; the rest is the cross-entropy of the text."""

    hidden: float = 0.0
    """Adds this many times the distance of each layer's outputs from the teacher's, as a share of their size."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"train.distill.share={self.share} must be between 0 and 1")
        if not 0 <= self.hidden < float("inf"):
            raise InputError(f"train.distill.hidden={self.hidden} must be at least 0, and finite")
        if self.share == 0 and self.hidden == 0:
            raise InputError("train.distill has share=0 and hidden=0: nothing would be learned from the teacher")


def make_teacher(model: Transformer, dtype: Literal["bfloat16", "float32"]) -> Transformer:
    """The model with activations and dense weights in `dtype`, that of the student; packed weights are made dense."""
    config = dataclasses.replace(model.config, dtype=dtype)
    values = {name: to_dense(param.get_value()).astype(dtype) for name, param in named_weights(model).items()}
    return replace_weights(abstract_transformer(config), values)


def distillation_loss(
    model: Transformer,
    teacher: Transformer,
    batch: Batch,
    config: DistillConfig,
    *,
    chunk: int,
    remat: Remat = "none",
    expert_balance: float = 0.0,
) -> tuple[jax.Array, BatchSums]:
    """What training minimizes, summed over the targets, as `batch_loss`; the loss here is the one beside the teacher.

    The distance of hidden states is SquareHead's, |f_t - f_s|^2 / |f_t|^2 (eq. 3), of each layer and token: sums over
    tokens are the same however a batch is cut, and the few tokens with states of enormous size do not drown the others.
    It is averaged over layers.
    """
    count = jnp.sum(batch.weights)
    teacher = jax.lax.stop_gradient(teacher)
    if config.hidden:
        hidden, teachers, distance, imbalances = _run_together(model, teacher, batch, remat)
    else:
        tokens, positions, segments = batch.tokens, batch.positions, batch.segments
        hidden, imbalances = model.read_counted(
            tokens, batch.weights, positions=positions, segments=segments, remat=remat
        )
        teachers, _ = teacher(tokens, positions=positions, segments=segments)
        distance = jnp.zeros(())
    loss = distillation_sum(
        hidden,
        model.head.get_value(),
        jax.lax.stop_gradient(teachers),
        teacher.head.get_value(),
        batch.targets,
        batch.weights,
        share=config.share,
        chunk=chunk,
    )
    return finish_loss(loss + config.hidden * distance, count, imbalances, expert_balance)


def _run_together(
    student: Transformer, teacher: Transformer, batch: Batch, remat: Remat
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The last hidden states of both, (B, T, D) and normalized; the summed distance of those between the layers; and
    what `Transformer.read_counted` says of the student's experts.

    Layer by layer: the states of all layers never exist together.
    """
    rotations = [model.make_rotations(batch.positions) for model in (student, teacher)]

    def step(
        carry: tuple[jax.Array, jax.Array], scanned: tuple[Block, Block, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]:
        ours, theirs = carry
        block, teachers, layer = scanned
        ours, _, imbalance = student.apply_block(
            block, layer, ours, batch.positions, rotations[0], batch.segments, None, batch.weights
        )
        theirs, *_ = teacher.apply_block(teachers, layer, theirs, batch.positions, rotations[1], batch.segments)
        theirs = jax.lax.stop_gradient(theirs)
        return (ours, theirs), (jnp.sum(batch.weights * _measure_distance(ours, theirs)), imbalance)

    if remat != "none":
        policies = jax.checkpoint_policies
        saveable = policies.dots_with_no_batch_dims_saveable if remat == "dots" else policies.nothing_saveable
        step = jax.checkpoint(step, policy=saveable, prevent_cse=False)
    carry = (student.embed_tokens(batch.tokens), teacher.embed_tokens(batch.tokens))
    layers = jnp.arange(student.config.layers)
    (ours, theirs), (distances, imbalances) = jax.lax.scan(step, carry, (student.layers, teacher.layers, layers))
    return student.final_norm(ours), teacher.final_norm(theirs), jnp.mean(distances), imbalances


def _measure_distance(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    """|theirs - ours|^2 / |theirs|^2 over the last axis, float32 (B, T)."""
    wide = theirs.astype(jnp.float32)
    missed = jnp.sum(jnp.square(wide - ours.astype(jnp.float32)), axis=-1)
    return missed / (jnp.sum(jnp.square(wide), axis=-1) + jnp.finfo(jnp.float32).tiny)
