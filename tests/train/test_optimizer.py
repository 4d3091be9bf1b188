"""AdamW and its schedule against ten lines of numpy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hsai.errors import InputError
from hsai.formats.storage import named_arrays
from hsai.train.optimizer import OptimizerConfig, make_optimizer, make_schedule, matrix_mask

PEAK = 2e-3


def rates(steps: int, **changes: Any) -> list[float]:
    """The learning rate of each step."""
    schedule = make_schedule(OptimizerConfig(learning_rate=PEAK, **changes), steps)
    return [float(schedule(jnp.asarray(step))) for step in range(steps)]


def test_warm_up_is_linear_and_already_moves_at_step_0() -> None:
    found = rates(20, warmup_steps=4)
    np.testing.assert_allclose(found[:5], [PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK, PEAK], rtol=1e-6)
    np.testing.assert_allclose(rates(20, warmup_steps=1)[:2], [PEAK, PEAK], rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 5])
def test_the_fall_has_its_form(warmup: int) -> None:
    steps = 25
    progress = (np.arange(warmup, steps) - warmup) / (steps - 1 - warmup)
    cosine = 0.1 + 0.9 * (1 + np.cos(math.pi * progress)) / 2
    linear = 1 - 0.9 * progress
    for schedule, share in (("cosine", cosine), ("linear", linear), ("constant", np.ones_like(progress))):
        found = rates(steps, warmup_steps=warmup, schedule=schedule, final_fraction=0.1)
        np.testing.assert_allclose(found[warmup:], PEAK * share, rtol=1e-5, err_msg=schedule)


def test_the_fall_ends_at_its_final_fraction() -> None:
    for name in ("cosine", "linear"):
        found = rates(50, warmup_steps=3, schedule=name, final_fraction=0.25)
        np.testing.assert_allclose(found[-1], 0.25 * PEAK, rtol=1e-6)
        assert found[3] == np.float32(PEAK) and len(rates(4, warmup_steps=3, schedule=name)) == 4


class Toy(nnx.Module):
    """One parameter of each kind: a matrix, a stack of matrices, a gain, a stack of gains."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.head = nnx.Param(jnp.asarray(draw.standard_normal((4, 6)), jnp.float32), out_sharding=("embed", "vocab"))
        self.stack = nnx.Param(
            jnp.asarray(draw.standard_normal((2, 4, 3)), jnp.float32), out_sharding=("layers", "embed", "mlp")
        )
        self.gain = nnx.Param(jnp.ones(4), out_sharding=("embed",))
        self.gains = nnx.Param(jnp.ones((2, 4)), out_sharding=("layers", "embed"))


def test_decay_spares_gains() -> None:
    assert named_arrays(matrix_mask(Toy())) == {"head": True, "stack": True, "gain": False, "gains": False}


def test_updates_are_those_of_adamw_by_hand() -> None:
    """1711.05101, algorithm 2, with decay times the learning rate, after clipping by the global norm."""
    config = OptimizerConfig(
        learning_rate=0.05, warmup_steps=2, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3, clip_norm=2.0
    )
    model, optimizer = Toy(), make_optimizer(config, 6)
    state, update = optimizer.init(model), jax.jit(optimizer.update)
    learning_rates = [float(make_schedule(config, 6)(step)) for step in range(6)]
    weights = {name: np.asarray(x, np.float64) for name, x in named_arrays(model).items()}
    mean = {name: np.zeros_like(x) for name, x in weights.items()}
    square = {name: np.zeros_like(x) for name, x in weights.items()}
    draw, norms = np.random.default_rng(1), []
    for step in range(6):
        # Norms on both sides of the clip.
        size = (step % 3) / 4
        leaves, treedef = jax.tree.flatten(model)
        grads = treedef.unflatten([jnp.asarray(size * draw.standard_normal(x.shape), jnp.float32) for x in leaves])
        named = {name: np.asarray(g, np.float64) for name, g in named_arrays(grads).items()}
        norms.append(math.sqrt(sum(float(np.sum(g**2)) for g in named.values())))
        for name, g in named.items():
            g = g * min(1.0, 2.0 / max(norms[-1], 1e-30))
            mean[name] = 0.8 * mean[name] + 0.2 * g
            square[name] = 0.9 * square[name] + 0.1 * g**2
            step_size = mean[name] / (1 - 0.8 ** (step + 1))
            step_size /= np.sqrt(square[name] / (1 - 0.9 ** (step + 1))) + 1e-6
            decay = 0.0 if name in ("gain", "gains") else 0.3
            weights[name] = weights[name] - learning_rates[step] * (step_size + decay * weights[name])
        updates, state = update(grads, state, model)
        model = optax.apply_updates(model, updates)
        for name, found in named_arrays(model).items():
            np.testing.assert_allclose(found, weights[name], rtol=2e-5, atol=2e-6, err_msg=f"{name} at step {step}")
    assert min(norms) < 2.0 < max(norms)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "optim.learning_rate=0.0 must be positive"),
        ({"clip_norm": -1.0}, "optim.clip_norm=-1.0 must be positive"),
        ({"b2": 1.0}, r"optim.b2=1.0 must be in \[0, 1\)"),
        ({"warmup_steps": -1}, "optim.warmup_steps=-1 must not be negative"),
        ({"weight_decay": -0.1}, "optim.weight_decay=-0.1 must not be negative"),
        ({"final_fraction": 1.5}, r"optim.final_fraction=1.5 must be in \[0, 1\]"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OptimizerConfig(**changes)
