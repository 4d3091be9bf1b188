"""A student beside its teacher: the loss of hidden states, and steps that are the same however they are cut."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hsai.errors import InputError
from hsai.formats.storage import named_arrays
from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import Block
from hsai.sharding import MeshConfig, make_mesh, tree_shardings, use_mesh
from hsai.train.distill import DistillConfig, distillation_loss, make_teacher
from hsai.train.loop import TrainConfig
from hsai.train.optimizer import OptimizerConfig, make_optimizer
from hsai.train.state import init_state, place_model
from hsai.train.step import batch_loss, make_train_step
from tests.train.batches import MODEL, SMALL, draw_batch, place

TEACHER = Path("teacher")


@pytest.fixture(scope="module")
def models() -> tuple[Transformer, Transformer]:
    """A student and a teacher with other weights."""

    def make(seed: int) -> Transformer:
        return jax.jit(lambda: Transformer(MODEL, rngs=nnx.Rngs(seed)))()

    return make(0), make(1)


def list_states(model: Transformer, batch: object) -> list[jax.Array]:
    """What each block gives, (B, T, D) a layer, in a loop."""
    x, states = model.embed_tokens(batch.tokens), []
    rotations = model.make_rotations(batch.positions)
    for layer in range(model.config.layers):
        block: Block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], model.layers)
        x, *_ = model.apply_block(block, jnp.int32(layer), x, batch.positions, rotations, batch.segments)
        states.append(x)
    return states


def plain_loss(student: Transformer, teacher: Transformer, config: DistillConfig) -> jax.Array:
    """The definition, with everything there at once."""
    batch = draw_batch(0)
    ours, theirs = list_states(student, batch), list_states(teacher, batch)
    p = jax.nn.log_softmax(student.logits(student.final_norm(ours[-1])))
    q = jax.nn.log_softmax(teacher.logits(teacher.final_norm(theirs[-1])))
    divergence = jnp.sum(jnp.exp(q) * (q - p), axis=-1)
    entropy = -jnp.take_along_axis(p, batch.targets[..., None], axis=-1)[..., 0]
    each = (1 - config.share) * entropy + config.share * divergence
    for a, b in zip(ours, theirs, strict=True):
        each += config.hidden / len(ours) * jnp.sum((a - b) ** 2, axis=-1) / jnp.sum(b**2, axis=-1)
    return jnp.sum(batch.weights * each)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(("share", "hidden"), [(0.7, 0.0), (0.5, 2.0), (0.0, 1.0)])
def test_value_and_gradient_are_the_plain_ones(
    models: tuple[Transformer, Transformer], share: float, hidden: float, remat: str
) -> None:
    config = DistillConfig(teacher=TEACHER, share=share, hidden=hidden)

    def lose(student: Transformer, teacher: Transformer) -> jax.Array:
        return distillation_loss(student, teacher, draw_batch(0), config, chunk=5, remat=remat)[0]

    wanted, grads = jax.jit(jax.value_and_grad(lambda *both: plain_loss(*both, config)))(*models)
    found, (ours, theirs) = jax.jit(jax.value_and_grad(lose, (0, 1)))(*models)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for name, grad in named_arrays(ours).items():
        scale = np.abs(named_arrays(grads)[name]).max()
        np.testing.assert_allclose(grad, named_arrays(grads)[name], rtol=0, atol=2e-5 * scale, err_msg=name)
    assert not any(np.any(grad) for grad in jax.tree.leaves(theirs))  # nothing flows back to the teacher


def test_a_student_that_is_its_teacher_has_only_the_text_to_learn(models: tuple[Transformer, Transformer]) -> None:
    student, _ = models
    config = DistillConfig(teacher=TEACHER, share=0.25, hidden=3.0)
    found, sums = distillation_loss(student, make_teacher(student, "float32"), draw_batch(0), config, chunk=8)
    text, _ = batch_loss(student, draw_batch(0), chunk=8)
    np.testing.assert_allclose(found, 0.75 * text, rtol=1e-5)
    assert sums.targets == draw_batch(0).weights.sum()


def test_a_teacher_of_another_shape_teaches_by_its_logits(models: tuple[Transformer, Transformer]) -> None:
    small = dataclasses.replace(TransformerConfig(**SMALL), layers=1, embed=32)
    teacher = jax.jit(lambda: Transformer(small, rngs=nnx.Rngs(2)))()
    config = DistillConfig(teacher=TEACHER)
    loss, _ = distillation_loss(models[0], make_teacher(teacher, "float32"), draw_batch(0), config, chunk=8)
    assert jnp.isfinite(loss)


Sizes = tuple[int, int, int]


def run(sizes: Sizes, accumulate: int = 1) -> list[float]:
    """The losses of some steps."""
    distill = DistillConfig(teacher=TEACHER, share=0.6, hidden=0.5)
    config = TrainConfig(steps=4, batch_size=8, loss_chunk=8, accumulate=accumulate, distill=distill)
    data, fsdp, parts = sizes
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, model=parts), jax.devices()[: data * fsdp * parts])
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=1), 4)
    teacher = jax.jit(lambda: Transformer(MODEL, rngs=nnx.Rngs(9)))()
    with use_mesh(mesh):
        state = init_state(MODEL, optimizer, mesh, 0)
        step = make_train_step(optimizer, optax.constant_schedule(1e-3), config, tree_shardings(state, mesh))
        placed, losses = place_model(make_teacher(teacher, "float32"), mesh), []
        for index in range(4):
            state, metrics = step(state, place(draw_batch(index), mesh), placed)
            losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize(("sizes", "accumulate"), [((2, 2, 2), 1), ((2, 1, 2), 2)], ids=str)
def test_losses_are_the_same_however_the_batch_is_cut(sizes: Sizes, accumulate: int) -> None:
    np.testing.assert_allclose(run(sizes, accumulate), run((1, 1, 1)), rtol=5e-5)


def test_what_cannot_be_learned_is_refused() -> None:
    for share in (-0.1, 1.1):
        with pytest.raises(InputError, match=f"train.distill.share={share} must be between 0 and 1"):
            DistillConfig(teacher=TEACHER, share=share)
    with pytest.raises(InputError, match="train.distill.hidden=-1 must be at least 0"):
        DistillConfig(teacher=TEACHER, hidden=-1)
    with pytest.raises(InputError, match="nothing would be learned"):
        DistillConfig(teacher=TEACHER, share=0)
