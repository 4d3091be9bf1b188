"""A model's loss and gradients on a mesh, by the TPU kernels of one device on each: they are those of one device."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hsai.models import Transformer, TransformerConfig
from hsai.sharding import MeshConfig, array_sharding, make_mesh, tree_shardings, use_mesh
from hsai.train.loss import cross_entropy_sum
from hsai.train.step import batch_loss
from hsai_kernels.dispatch import compile_for
from hsai_kernels.interpret import interpret_tpu
from tests.train.batches import draw_batch, place

# Data alone; all kinds of splits; fewer kv heads than devices of a tensor-parallel group.
MESHES = [(8, 1, 1), (2, 2, 2), (1, 1, 4)]
MODEL = TransformerConfig(
    vocab=256, embed=128, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=64, max_length=32, dtype="float32"
)
KERNELS = ("attention_forward", "attention_backward_queries", "attention_backward_keys", "cross_entropy_forward")
BATCH = draw_batch(3)
GRADIENT = jax.value_and_grad(functools.partial(batch_loss, chunk=8, remat="full"), has_aux=True)


def mesh_of(data: int, fsdp: int, model: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, model=model), jax.devices()[: data * fsdp * model])


@functools.cache
def model() -> Transformer:
    return jax.tree.map(np.asarray, jax.jit(lambda: Transformer(MODEL, rngs=nnx.Rngs(0)))())


@functools.cache
def wanted() -> tuple[jax.Array, Transformer]:
    """Of one device, in plain jax."""
    (loss, _), gradients = jax.jit(GRADIENT)(model(), BATCH)
    return loss, gradients


@pytest.fixture
def no_races(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out


def check(sizes: tuple[int, int, int], gradient: Callable[..., Any] = GRADIENT) -> None:
    """Fails unless loss and gradients are those of one device, the latter where the weights are."""
    mesh = mesh_of(*sizes)
    with use_mesh(mesh):
        shardings = tree_shardings(model(), mesh)
        placed = jax.device_put(model(), shardings)
        (loss, _), gradients = jax.jit(gradient, out_shardings=(None, shardings))(placed, place(BATCH, mesh))
    np.testing.assert_allclose(loss, wanted()[0], rtol=1e-5)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted()[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("sizes", MESHES)
def test_plain_jax_gives_the_numbers_of_one_device(sizes: tuple[int, int, int]) -> None:
    check(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 2, 2), (1, 1, 4), (4, 1, 1)])
def test_kernels_give_the_numbers_of_one_device(sizes: tuple[int, int, int], no_races: None) -> None:
    wanted()  # before, in plain jax
    with interpret_tpu():  # which has effects, and those cannot be rematerialized
        check(sizes, jax.value_and_grad(functools.partial(batch_loss, chunk=8), has_aux=True))


@pytest.mark.parametrize("sizes", MESHES)
def test_a_training_program_for_a_mesh_of_tpus_holds_the_kernels(sizes: tuple[int, int, int]) -> None:
    """Of one device's rows, heads and words each."""
    with compile_for("tpu"), use_mesh(mesh_of(*sizes)):
        program = str(jax.make_jaxpr(GRADIENT)(model(), BATCH))
    for kernel in (*KERNELS, "cross_entropy_backward"):
        assert f"name={kernel}" in program, kernel
    rows, heads = 8 // (sizes[0] * sizes[1]), max(1, MODEL.kv_heads // sizes[2])
    assert f"f32[{rows},{heads},{16 * MODEL.heads // (sizes[2] * heads)},16]" in program  # queries, by kv heads
    assert f"f32[128,{256 // sizes[2]}]" in program


@pytest.mark.parametrize("sizes", MESHES)
def test_bfloat16_gradients_of_the_loss_are_summed_in_float32(sizes: tuple[int, int, int]) -> None:
    """As exact, split, as on one device: within a rounding of it."""
    draw = np.random.default_rng(0)
    hidden = jnp.asarray(draw.standard_normal((8, 16, 128)), jnp.bfloat16)
    head = jnp.asarray(draw.standard_normal((128, 256)) * 0.2, jnp.float32)
    run = jax.jit(jax.value_and_grad(functools.partial(cross_entropy_sum, chunk=8), (0, 1)))
    loss, (d_hidden, d_head) = run(hidden, head, BATCH.targets, BATCH.weights)
    mesh = mesh_of(*sizes)
    with use_mesh(mesh):
        placed = jax.device_put(head, array_sharding(mesh, ("embed", "vocab"), head.shape))
        found, (by_hidden, by_head) = run(hidden, placed, BATCH.targets, BATCH.weights)
    assert by_hidden.dtype == jnp.bfloat16 and by_head.dtype == jnp.float32
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    np.testing.assert_allclose(by_head, d_head, rtol=0, atol=1e-4)
    np.testing.assert_allclose(by_hidden.astype(np.float32), d_hidden.astype(np.float32), rtol=2**-7, atol=1e-6)


def test_a_target_outside_of_a_split_vocabulary_is_nan() -> None:
    hidden, head = jnp.ones((8, 16, 128)), jnp.ones((128, 256))
    with use_mesh(mesh_of(2, 2, 2)):
        for target, weight, bad in ((256, 1.0, True), (-1, 1.0, True), (256, 0.0, False), (255, 1.0, False)):
            targets, weights = BATCH.targets.copy(), np.ones((8, 16), np.float32)
            targets[5, 3], weights[5, 3] = target, weight
            loss = jax.jit(functools.partial(cross_entropy_sum, chunk=8))(hidden, head, targets, weights)
            assert bool(jnp.isnan(loss)) == bad
