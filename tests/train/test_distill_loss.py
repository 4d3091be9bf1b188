"""Distillation in chunks: the plain loss and its gradients, without the plain one's memory, on any mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.sharding import MeshConfig, array_sharding, make_mesh, use_mesh
from hsai.train.distill_loss import distillation_sum
from hsai.train.loss import cross_entropy_sum
from tests.train.test_loss import shapes_in

B, D, E, V = 8, 16, 12, 48


def make_inputs(length: int, seed: int = 0) -> tuple[Any, ...]:
    """hidden, head, those of the teacher, targets, and weights of which some are zero and some are no ones."""
    draw = np.random.default_rng(seed)
    hidden, theirs = (draw.standard_normal((B, length, size)).astype(np.float32) for size in (D, E))
    head, teacher = (draw.standard_normal((size, V)).astype(np.float32) for size in (D, E))
    weights = draw.choice([0.0, 0.5, 1.0], (B, length)).astype(np.float32)
    return hidden, head, theirs, teacher, draw.integers(0, V, (B, length), np.int32), weights


def plain(hidden: Any, head: Any, theirs: Any, teacher: Any, targets: Any, weights: Any, share: float) -> jax.Array:
    """The definition."""
    p, q = jax.nn.softmax(hidden @ head), jax.nn.softmax(theirs @ teacher)
    divergence = jnp.sum(q * (jnp.log(q) - jnp.log(p)), axis=-1)
    entropy = -jnp.log(jnp.take_along_axis(p, targets[..., None], axis=-1)[..., 0])
    return jnp.sum(weights * ((1 - share) * entropy + share * divergence))


CHUNKED = jax.jit(jax.value_and_grad(distillation_sum, (0, 1)), static_argnames=("share", "chunk"))
PLAIN = jax.jit(jax.value_and_grad(plain, (0, 1)))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("length", "chunk"), [(12, 4), (12, 5), (12, 1), (12, 50), (1, 3)])
def test_value_and_gradients_are_the_plain_ones(length: int, chunk: int, share: float) -> None:
    """Chunks that divide T, that do not, and that exceed it."""
    for seed in range(2):
        inputs = make_inputs(length, seed)
        wanted, (by_hidden, by_head) = PLAIN(*inputs, share)
        found, grads = CHUNKED(*inputs, share=share, chunk=chunk)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(grads[0], by_hidden, rtol=0, atol=1e-5)
        np.testing.assert_allclose(grads[1], by_head, rtol=0, atol=1e-4)
        assert found.dtype == jnp.float32


def test_the_extremes_are_cross_entropy_and_the_teacher_itself() -> None:
    hidden, head, theirs, teacher, targets, weights = make_inputs(9)
    text = cross_entropy_sum(hidden, head, targets, weights, chunk=4)
    found = distillation_sum(hidden, head, theirs, teacher, targets, weights, share=0.0, chunk=4)
    np.testing.assert_allclose(found, text, rtol=1e-6)
    alone, grads = CHUNKED(hidden, head, hidden, head, targets, weights, share=1.0, chunk=4)
    assert abs(float(alone)) < 1e-4 and all(np.abs(grad).max() < 1e-5 for grad in grads)


def test_large_logits_do_not_overflow() -> None:
    hidden, head, theirs, *others = make_inputs(4)
    found, grads = CHUNKED(1e3 * hidden, head, 1e3 * theirs, *others, share=0.5, chunk=2)
    assert jnp.isfinite(found) and all(jnp.isfinite(grad).all() for grad in grads)


def test_bfloat16_activations_give_a_float32_head_gradient() -> None:
    hidden, head, theirs, *others = make_inputs(12)
    wanted = PLAIN(hidden, head, theirs, *others, 0.5)[1][1]
    low = (jnp.asarray(hidden, jnp.bfloat16), head, jnp.asarray(theirs, jnp.bfloat16))
    found = CHUNKED(*low, *others, share=0.5, chunk=4)[1][1]
    assert found.dtype == jnp.float32
    assert jnp.linalg.norm(found - wanted) < 0.02 * jnp.linalg.norm(wanted)


def test_a_target_outside_of_the_vocabulary_is_nan_unless_it_is_left_out() -> None:
    *models, targets, weights = make_inputs(6)
    targets[2, 3] = V
    for weight, bad in ((1.0, True), (0.0, False)):
        weights[2, 3] = weight
        assert bool(jnp.isnan(distillation_sum(*models, targets, weights, share=0.5, chunk=4))) == bad


def test_no_program_holds_the_logits_of_all_positions() -> None:
    def largest(chunk: int) -> int:
        grad = jax.grad(lambda *xs: distillation_sum(*xs, share=0.5, chunk=chunk), (0, 1))
        shapes = list(shapes_in(jax.make_jaxpr(grad)(*make_inputs(32)).jaxpr))
        return max(int(np.prod(shape)) // V for shape in shapes if V in shape and D not in shape and E not in shape)

    assert largest(4) == B * 4
    assert largest(32) == B * 32  # the search finds them where they are


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_every_mesh_gives_the_same_numbers(sizes: tuple[int, int, int]) -> None:
    hidden, head, theirs, teacher, targets, weights = make_inputs(12)
    wanted, grads = CHUNKED(hidden, head, theirs, teacher, targets, weights, share=0.4, chunk=5)
    mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "model"), sizes, strict=True))))
    with use_mesh(mesh):
        axes = ("embed", "vocab")
        placed = [jax.device_put(x, array_sharding(mesh, axes, x.shape)) for x in (head, teacher)]
        run = jax.jit(jax.value_and_grad(distillation_sum, (0, 1)), static_argnames=("share", "chunk"))
        found, split = run(hidden, placed[0], theirs, placed[1], targets, weights, share=0.4, chunk=5)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for ours, alone in zip(split, grads, strict=True):
        np.testing.assert_allclose(ours, alone, rtol=0, atol=2e-5)
