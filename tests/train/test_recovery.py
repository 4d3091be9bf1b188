"""Recovery: a one-shot model is trained beside the dense one, in its format, and comes closer to it."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.compress import RecipeConfig, Rule, compress, plan_recipe
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.solvers import FeedbackConfig
from hsai.data.packing import Batch
from hsai.formats import FormatConfig, Int4Config, NMInt4Config, TernaryConfig, is_packed_as
from hsai.formats.storage import named_arrays, named_weights
from hsai.models import Transformer
from hsai.sharding import MeshConfig, make_mesh
from hsai.train.distill import DistillConfig, make_teacher
from hsai.train.formats import FormatRule, Rules, pack_trained
from hsai.train.loop import TrainConfig
from hsai.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from hsai.train.state import TrainState, adopt_state, init_state
from hsai.train.step import batch_loss, make_train_step
from tests.train.batches import MODEL

ROWS, LENGTH, VOCAB = 16, 32, MODEL.vocab


def draw_chain(seed: int) -> Batch:
    """Rows in which three of four tokens follow from the one before, by a table that a model can learn."""
    draw = np.random.default_rng(seed)
    follows = np.random.default_rng(0).permutation(VOCAB)
    stream = draw.integers(0, VOCAB, (ROWS, LENGTH + 1))
    for column in range(1, LENGTH + 1):
        known = draw.random(ROWS) < 0.75
        stream[:, column] = np.where(known, follows[stream[:, column - 1]], stream[:, column])
    stream = stream.astype(np.int32)
    places = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    return Batch(
        tokens=stream[:, :-1],
        targets=stream[:, 1:],
        segments=np.zeros_like(places),
        positions=places,
        weights=np.ones(places.shape, np.float32),
    )


def learn(
    state: TrainState, steps: int, rate: float, teacher: Transformer | None = None, rules: Rules = ()
) -> TrainState:
    distill = None if teacher is None else DistillConfig(teacher=Path("dense"), share=0.7, hidden=0.3)
    config = TrainConfig(steps=steps, batch_size=ROWS, loss_chunk=LENGTH, distill=distill, formats=rules)
    optim = OptimizerConfig(learning_rate=rate, warmup_steps=5, weight_decay=0.0)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(make_optimizer(optim, steps), make_schedule(optim, steps), config, shardings)
    for index in range(steps):
        state, _ = step(state, draw_chain(index), teacher)
    return state


def measure(model: Transformer) -> float:
    """Nats a token on rows that no training saw."""
    lose = jax.jit(functools.partial(batch_loss, chunk=LENGTH))
    found = [jax.device_get(lose(model, draw_chain(10_000 + index))[1]) for index in range(4)]
    return float(sum(sums.loss for sums in found) / sum(sums.targets for sums in found))


MESH = make_mesh(MeshConfig(), jax.devices()[:1])
OPTIMIZER = make_optimizer(OptimizerConfig(weight_decay=0.0), 100)


@pytest.fixture(scope="module")
def dense() -> Transformer:
    return learn(init_state(MODEL, OPTIMIZER, MESH, 0), 150, 1e-2).model


@pytest.mark.parametrize("format", [NMInt4Config(n=2, m=4, group=32), TernaryConfig(group=32)], ids=str)
def test_recovery_lowers_the_loss_at_the_same_format(dense: Transformer, format: FormatConfig) -> None:
    recipe = RecipeConfig(
        rules=(Rule(pattern="layers.*", format=format), Rule(pattern="embed", format=Int4Config(group=32)))
    )
    one_shot, _ = compress(dense, recipe)
    rules = tuple(
        FormatRule(
            pattern=rule.pattern,
            format=rule.format,
            scales="learned",
            masks="fixed" if hasattr(rule.format, "mask") else "magnitude",
        )
        for rule in recipe.rules
    )
    start = adopt_state(MODEL, one_shot, OPTIMIZER, MESH, rules)
    teacher = make_teacher(dense, "float32")
    recovered = pack_trained(learn(start, 80, 2e-3, teacher, rules).model, rules)

    losses = [measure(model) for model in (dense, recovered, one_shot)]
    assert losses[1] - losses[0] < 0.5 * (losses[2] - losses[0]), losses
    for name, param in named_weights(recovered).items():
        value, before = param.get_value(), named_weights(one_shot)[name].get_value()
        if isinstance(before, jax.Array):
            continue
        assert is_packed_as(value, format if name.startswith("layers.") else Int4Config(group=32)), name
        if before.kept() is not None:
            assert np.array_equal(value.kept(), before.kept()), name
    solving = RecipeConfig(
        rules=tuple(replace(rule, solver=FeedbackConfig()) for rule in recipe.rules), calibration=CalibrationConfig()
    )
    assert plan_recipe(solving, dense).reads_text and not plan_recipe(solving, recovered).reads_text
    packed, ledger = compress(recovered, solving)
    for name, array in named_arrays(recovered).items():
        assert jnp.array_equal(named_arrays(packed)[name], array), name
    assert ledger.layers == () and {row.relative_error for row in ledger.rows} == {None, 0}  # norms are dense
    assert ledger.bytes == sum(array.nbytes for array in named_arrays(one_shot).values())
