"""Training keeps experts busy alike, the same on every mesh, and says how busy they are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hsai.config import RunConfig
from hsai.errors import InputError
from hsai.formats.storage import named_arrays, replace_weights
from hsai.models import MoEConfig, Transformer, TransformerConfig
from hsai.sharding import MeshConfig, make_mesh, tree_shardings, use_mesh
from hsai.train.loop import TrainConfig
from hsai.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from hsai.train.state import TrainState
from hsai.train.step import batch_loss, make_train_step
from tests.train.batches import MODEL, SMALL, draw_batch, place

EXPERTS = TransformerConfig(**SMALL | {"mlp": 32, "moe": MoEConfig(experts=4, active=1)})
STEPS = 15


def lean_to_one(model: Transformer) -> Transformer:
    """All tokens have something in common, by which each layer's router takes the first expert."""
    common = np.random.default_rng(0).standard_normal((1, 64, 1)).astype(np.float32)
    router, embed = model.layers.mlp.router[...], model.embed[...]
    return replace_weights(
        model, {"layers.mlp.router": router.at[..., :1].add(0.1 * common), "embed": embed + common[0]}
    )


@functools.cache
def run(expert_balance: float, accumulate: int = 1) -> list[dict[str, float]]:
    """The metrics of a short run that begins with all tokens at one expert."""
    optim = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant", weight_decay=0.0)
    config = TrainConfig(steps=STEPS, batch_size=8, loss_chunk=16, accumulate=accumulate, expert_balance=expert_balance)
    optimizer = make_optimizer(optim, STEPS)
    model = jax.jit(lambda: lean_to_one(Transformer(EXPERTS, rngs=nnx.Rngs(0))))()
    with use_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])) as mesh:
        state = TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model))
        state = jax.device_put(state, tree_shardings(state, mesh))
        step = make_train_step(optimizer, make_schedule(optim, STEPS), config, tree_shardings(state, mesh))
        rows = []
        for index in range(STEPS):
            state, metrics = step(state, place(draw_batch(index), mesh))
            rows.append({name: float(value) for name, value in metrics.items()})
    return rows


def test_experts_become_busy_alike() -> None:
    without, balanced = run(0.0), run(0.1)
    assert without[0]["expert_imbalance"] == pytest.approx(balanced[0]["expert_imbalance"], rel=1e-6)
    late = [np.mean([row["expert_imbalance"] for row in rows[-5:]]) for rows in (without, balanced)]
    assert late[0] > 3 and late[1] < 2.2  # four experts: 4 where all tokens surely go to one
    # What is logged as the loss is that of the targets; what is followed is not.
    assert without[0]["loss"] == balanced[0]["loss"] and without[0]["grad_norm"] != balanced[0]["grad_norm"]
    assert balanced[-1]["loss"] < balanced[0]["loss"] - 0.5


def test_micro_batches_are_balanced_each() -> None:
    first, parts = run(0.1)[0], run(0.1, accumulate=4)[0]
    assert parts["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert parts["expert_imbalance"] == pytest.approx(first["expert_imbalance"], rel=0.1)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 4)], ids=str)
def test_a_mesh_follows_the_same_gradient(sizes: tuple[int, int, int]) -> None:
    model = jax.jit(lambda: Transformer(EXPERTS, rngs=nnx.Rngs(0)))()
    objective = jax.value_and_grad(functools.partial(batch_loss, chunk=8, expert_balance=0.5), has_aux=True)
    (wanted, sums), grads = jax.jit(objective)(model, draw_batch(0))
    assert wanted > 1.2 * sums.loss
    config = MeshConfig(**dict(zip(("data", "fsdp", "model"), sizes, strict=True)))
    with use_mesh(make_mesh(config, jax.devices()[: int(np.prod(sizes))])) as mesh:
        shardings = tree_shardings(model, mesh)
        placed = jax.device_put(model, shardings)
        (found, split), others = jax.jit(objective, out_shardings=(None, shardings))(placed, place(draw_batch(0), mesh))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(split.imbalance, sums.imbalance, rtol=1e-5)
    for name, grad in named_arrays(others).items():
        scale = float(jnp.abs(named_arrays(grads)[name]).max())
        np.testing.assert_allclose(grad, named_arrays(grads)[name], rtol=0, atol=2e-5 * scale, err_msg=name)


def test_what_has_no_experts_has_none_to_balance() -> None:
    _, sums = jax.jit(functools.partial(batch_loss, chunk=8))(Transformer(MODEL, rngs=nnx.Rngs(0)), draw_batch(0))
    assert sums.imbalance == 0
    large = dataclasses.replace(MODEL, vocab=4096, max_length=512)
    with pytest.raises(InputError, match="train.expert_balance=0.01 balances experts, and the model has none"):
        RunConfig(model=large, train=TrainConfig(expert_balance=0.01))
    RunConfig(model=dataclasses.replace(large, moe=EXPERTS.moe), train=TrainConfig(expert_balance=0.01))
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"train.expert_balance={value} must be a number that is not negative"):
            TrainConfig(expert_balance=value)
