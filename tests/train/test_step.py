"""A training step: the same numbers however the batch is cut, over micro-batches or over devices."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hsai.formats.storage import fill, named_arrays
from hsai.models import TransformerConfig
from hsai.models.transformer import abstract_transformer
from hsai.sharding import MeshConfig, make_mesh, tree_shardings, use_mesh
from hsai.train.loop import TrainConfig
from hsai.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from hsai.train.state import TrainState, init_state
from hsai.train.step import batch_loss, make_train_step, split_batch
from tests.train.batches import MODEL, SMALL, draw_batch, place

STEPS = 5
OPTIM = OptimizerConfig(learning_rate=1e-3, warmup_steps=2)
TRAIN = TrainConfig(steps=STEPS, batch_size=8, loss_chunk=8)
Sizes = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a short run left."""

    metrics: list[dict[str, float]]
    """One a step."""

    state: TrainState
    """The last."""

    start: dict[str, np.ndarray]
    """The weights before the first step."""

    program: jax.stages.Compiled
    """The step; once compiled, it refuses a state that is laid out in another way than the first."""


def make_sized_mesh(sizes: Sizes) -> jax.sharding.Mesh:
    """A mesh over the first of the fake devices."""
    config = MeshConfig(**dict(zip(("data", "fsdp", "model"), sizes, strict=True)))
    return make_mesh(config, jax.devices()[: int(np.prod(sizes))])


@functools.cache
def run(sizes: Sizes, model: TransformerConfig = MODEL) -> Outcome:
    """STEPS steps from the same start on the same batches."""
    mesh, optimizer = make_sized_mesh(sizes), make_optimizer(OPTIM, STEPS)
    with use_mesh(mesh):
        state = init_state(model, optimizer, mesh, seed=0)
        # Copies: on a CPU, numpy would look into the same memory, and jax does not take over what is looked at.
        start = {name: np.array(array) for name, array in named_arrays(state.model).items()}
        step = make_train_step(optimizer, make_schedule(OPTIM, STEPS), TRAIN, tree_shardings(state, mesh))
        program = step.lower(state, place(draw_batch(0), mesh)).compile()
        rows = []
        for index in range(STEPS):
            given = state
            state, metrics = program(given, place(draw_batch(index), mesh))
            rows.append({name: float(value) for name, value in metrics.items()})
            assert all(array.is_deleted() for array in jax.tree.leaves(given))  # its memory was taken over
    return Outcome(metrics=rows, state=state, start=start, program=program)


MESHES: list[Sizes] = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 4), (1, 8, 1), (2, 2, 2)]


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "data {} fsdp {} model {}".format(*sizes))
def test_losses_and_weights_are_the_same_on_every_mesh(sizes: Sizes) -> None:
    """Losses to 2e-5 of themselves. Weights to 1 % of the way they went: AdamW divides a gradient by its own size, so
    that where it is almost nothing, the order of a sum decides about a step."""
    alone, spread = run((1, 1, 1)), run(sizes)
    for name, tolerance in (("loss", 2e-5), ("grad_norm", 1e-4), ("update_norm", 1e-4)):
        wanted = [row[name] for row in alone.metrics]
        np.testing.assert_allclose([row[name] for row in spread.metrics], wanted, rtol=tolerance, err_msg=name)
    found = jax.device_get(named_arrays(spread.state.model))
    for name, wanted in jax.device_get(named_arrays(alone.state.model)).items():
        assert np.array_equal(alone.start[name], spread.start[name]), name
        way = np.linalg.norm(wanted - alone.start[name])
        assert np.linalg.norm(found[name] - wanted) < 0.01 * way, name


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_the_state_stays_split(sizes: Sizes) -> None:
    state = run(sizes).state
    mesh = named_arrays(state.model)["embed"].sharding.mesh
    for array, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(tree_shardings(state, mesh)), strict=True):
        assert array.sharding == wanted
    for tree in (state.model, state.optimizer[1].mu, state.optimizer[1].nu):
        gate = named_arrays(tree)["layers.mlp.gate"]
        assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 64 // sizes[1], 128 // sizes[2])}


@functools.cache
def gradient(accumulate: int, sizes: Sizes = (1, 1, 1)) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The gradient that a step follows: with plain descent at rate 1, what it subtracts."""
    mesh, optimizer, config = make_sized_mesh(sizes), optax.sgd(1.0), dataclasses.replace(TRAIN, accumulate=accumulate)
    with use_mesh(mesh):
        state = init_state(MODEL, optimizer, mesh, seed=0)
        before = jax.device_get(named_arrays(state.model))
        step = make_train_step(optimizer, optax.constant_schedule(1.0), config, tree_shardings(state, mesh))
        state, metrics = step(state, place(draw_batch(0), mesh))
    after = jax.device_get(named_arrays(state.model))
    return {name: before[name] - after[name] for name in before}, jax.device_get(metrics)


@pytest.mark.parametrize(("accumulate", "sizes"), [(4, (1, 1, 1)), (2, (2, 2, 1))])
def test_accumulation_changes_no_gradient(accumulate: int, sizes: Sizes) -> None:
    """Micro-batches hold unequal numbers of targets; each target weighs the same all the same."""
    parts = split_batch(draw_batch(0), accumulate)
    assert len({float(count) for count in parts.weights.sum(axis=(1, 2))}) > 1
    wanted, whole = gradient(1)
    found, metrics = gradient(accumulate, sizes)
    for name in wanted:
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-5 * scale + 2e-7, err_msg=name)
    assert metrics["tokens"] == whole["tokens"] == draw_batch(0).weights.sum()
    np.testing.assert_allclose(metrics["loss"], whole["loss"], rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_micro_batches_are_the_batch_and_each_device_keeps_its_rows(parts: int) -> None:
    batch = draw_batch(0)
    split = split_batch(batch, parts)
    assert split.tokens.shape == (parts, 8 // parts, 16)
    rows = [row.tobytes() for part in np.asarray(split.tokens) for row in part]
    assert sorted(rows) == sorted(row.tobytes() for row in batch.tokens)
    # With two devices, the first holds rows 0 to 3: those make the first half of every micro-batch.
    first = {row.tobytes() for row in batch.tokens[:4]}
    assert {row.tobytes() for part in np.asarray(split.tokens) for row in part[: 4 // parts]} == first


def test_metrics_are_what_they_say() -> None:
    batch = draw_batch(0)
    found = run((1, 1, 1))
    model = fill(abstract_transformer(MODEL), found.start)
    (total, sums), grads = jax.jit(jax.value_and_grad(lambda m: batch_loss(m, batch, chunk=16), has_aux=True))(model)
    first = found.metrics[0]
    np.testing.assert_allclose(first["loss"], total / sums.targets, rtol=1e-5)
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(g / sums.targets))) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(first["grad_norm"], norm, rtol=1e-4)  # before clipping
    assert [row["learning_rate"] for row in found.metrics][:2] == pytest.approx([0.5e-3, 1e-3])
    assert int(found.state.step) == STEPS
    assert found.metrics[-1]["loss"] < first["loss"] - 0.05  # and it learns


def test_memory_is_reused_and_wires_carry_what_they_should() -> None:
    state, program = run((1, 8, 1)).state, run((1, 8, 1)).program
    held = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes == held  # no second state, not even for a moment
    assert held < sum(array.nbytes for array in jax.tree.leaves(state)) / 7.9
    collectives = r"(all-gather|reduce-scatter|all-reduce|collective-permute|all-to-all)(?:-start)?\("
    names = set(re.findall(collectives, program.as_text()))
    assert "all-gather" in names  # weights, on their way in
    assert names & {"reduce-scatter", "all-reduce"}  # gradients, on their way out
    assert not names & {"collective-permute", "all-to-all"}


def test_bfloat16_trains_with_a_float32_state() -> None:
    """Two digits of each product: the curve is the float32 one to 1 %."""
    found = run((2, 1, 1), TransformerConfig(**SMALL | {"dtype": "bfloat16"}))
    assert {leaf.dtype for leaf in jax.tree.leaves(found.state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    wanted = [row["loss"] for row in run((1, 1, 1)).metrics]
    np.testing.assert_allclose([row["loss"] for row in found.metrics], wanted, rtol=0.01)
