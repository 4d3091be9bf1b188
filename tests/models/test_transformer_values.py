"""The decoder's numbers against a second, independent writing of it (naive.py): values, and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.data.packing import Batch
from hsai.formats.storage import named_arrays
from hsai.models import MoEConfig, RopeConfig, RopeScaling, Transformer
from hsai.models.rope import frequencies
from hsai.train.step import batch_loss
from tests.models import naive
from tests.models.conftest import MakeModel

LENGTH = 17
TOLERANCE = 1e-4
"""Largest difference of a logit: float32 against float64. The logits of these models reach about 10."""

# Within 32 tokens some pairs turn often (kept), some hardly (stretched), and some lie between (blended).
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=32)

GEMMA: dict[str, Any] = {
    "layers": 3,
    "sliding_window": 4,
    "global_every": 3,
    "rope": RopeConfig(theta=1e6, scaling=RopeScaling(kind="linear", factor=8.0)),
    "local_rope": RopeConfig(theta=1e4),
    "query_scalar": 16,
    "qk_norm": True,
    "norm_plus_one": True,
    "post_norm": True,
    "scale_embeddings": True,
    "activation": "gelu",
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama, tied": {},
    "llama, untied": {"tie_embeddings": False},
    "as many kv heads as heads": {"kv_heads": 4},
    "one kv head": {"kv_heads": 1},
    "heads wider than the stream": {"head_dim": 16},
    "qwen": {"qk_norm": True, "norm_eps": 1e-6},
    "mistral": {"sliding_window": 4, "tie_embeddings": False},
    "geglu": {"activation": "gelu"},
    "linear scaling": {"rope": RopeConfig(scaling=RopeScaling(kind="linear", factor=4.0))},
    "qwen 2": {"qkv_bias": True},
    "softer scores": {"query_scalar": 3},
    "gains on top of one": {"norm_plus_one": True},
    "norms behind": {"post_norm": True},
    "scaled embeddings": {"scale_embeddings": True},
    "some layers global": {"layers": 5, "sliding_window": 4, "global_every": 2},
    "local rope": {"layers": 3, "sliding_window": 4, "global_every": 3, "local_rope": RopeConfig(theta=10.0)},
    "gemma 3": GEMMA,
    "mixtral": {"moe": MoEConfig(experts=5, active=2), "mlp": 24},
    "weights as they are": {"moe": MoEConfig(experts=5, active=2, normalize=False), "mlp": 24},
    "more choices than tokens": {"moe": MoEConfig(experts=71, active=2), "mlp": 8},
    "one expert": {"moe": MoEConfig(experts=1, active=1)},
    "llama 3 scaling": {"head_dim": 16, "rope": RopeConfig(theta=100.0, scaling=LLAMA3)},
}


@jax.jit
def forward(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model.logits(model(tokens)[0])


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=list(FAMILIES))
def test_logits_are_the_naive_ones(make_model: MakeModel, changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab, (2, LENGTH), np.int32)
    found = forward(model, tokens)
    weights = {name: np.asarray(value) for name, value in named_arrays(model).items()}
    wanted = np.stack([naive.logits(model.config, weights, row) for row in tokens])
    assert np.abs(wanted).max() > 1  # the comparison is of something
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_a_family_differs_from_the_plain_one(make_model: MakeModel) -> None:
    """Each option changes the numbers, so that agreement above means that it is in both, not in neither."""
    tokens = np.random.default_rng(0).integers(0, 61, (2, LENGTH), np.int32)
    plain = make_model()
    base = forward(plain, tokens)
    options = ("linear scaling", "softer scores", "gains on top of one", "scaled embeddings")
    for changes in ({"sliding_window": 4}, {"activation": "gelu"}, *(FAMILIES[n] for n in options)):
        model = make_model(**changes)
        assert named_arrays(model).keys() == named_arrays(plain).keys()
        assert np.abs(np.asarray(forward(model, tokens) - base)).max() > 0.01


def test_llama3_scaling_is_tested_in_all_three_regimes() -> None:
    config = RopeConfig(theta=100.0, scaling=LLAMA3)
    ratio = frequencies(config, 16) / frequencies(RopeConfig(theta=100.0), 16)
    assert np.isclose(ratio, 1).any() and np.isclose(ratio, 1 / 8).any()
    assert ((ratio > 0.13) & (ratio < 0.99)).any()


def test_what_only_layers_beside_global_ones_have_changes_them(make_model: MakeModel) -> None:
    tokens = np.random.default_rng(0).integers(0, 61, (2, LENGTH), np.int32)
    several = [{"sliding_window": 4}, {"sliding_window": 4, "global_every": 2}]
    several.append(several[1] | {"local_rope": RopeConfig(theta=10.0)})
    found = [np.asarray(forward(make_model(**changes), tokens)) for changes in several]
    assert np.abs(found[0] - found[1]).max() > 0.01 and np.abs(found[1] - found[2]).max() > 0.01


GRADIENTS: dict[str, dict[str, Any]] = {
    "qwen, windowed": {"qk_norm": True, "sliding_window": 6, "tie_embeddings": False},
    "gemma 3 with biases": GEMMA | {"qkv_bias": True},
    "experts": {"moe": MoEConfig(experts=5, active=2), "mlp": 24},
}


@pytest.mark.parametrize("changes", GRADIENTS.values(), ids=list(GRADIENTS))
def test_gradient_is_the_slope_of_the_naive_loss(make_model: MakeModel, changes: dict[str, Any]) -> None:
    """Along a random direction of each weight; float32 autodiff against float64 central differences."""
    model = make_model(**changes)
    draw = np.random.default_rng(2)
    row = draw.integers(0, model.config.vocab, LENGTH + 1, np.int32)
    tokens, targets = row[:-1], row[1:]
    batch = Batch(
        tokens=tokens[None],
        targets=targets[None],
        segments=np.zeros((1, LENGTH), np.int32),
        positions=np.arange(LENGTH, dtype=np.int32)[None],
        weights=np.ones((1, LENGTH), np.float32),
    )
    grads = named_arrays(jax.jit(jax.grad(lambda m: batch_loss(m, batch, chunk=5)[0]))(model))
    weights = {name: np.asarray(value, np.float64) for name, value in named_arrays(model).items()}
    for name, grad in grads.items():
        assert jnp.all(jnp.isfinite(grad))
        direction = draw.standard_normal(grad.shape)
        ahead, behind = ({**weights, name: weights[name] + step * direction} for step in (1e-5, -1e-5))
        slope = naive.loss(model.config, ahead, tokens, targets) - naive.loss(model.config, behind, tokens, targets)
        scale = float(np.linalg.norm(grad))
        assert scale > 1e-3, name
        assert abs(slope / 2e-5 - float(np.sum(grad * direction))) < 1e-3 * scale, name


@pytest.mark.parametrize("active", [1, 2])
def test_experts_are_balanced_by_the_naive_imbalance(make_model: MakeModel, active: int) -> None:
    """Value, and slope along a random direction of weights before the routers and of the routers themselves."""
    model = make_model(moe=MoEConfig(experts=5, active=active), mlp=24)
    draw = np.random.default_rng(2)
    tokens = draw.integers(0, model.config.vocab, LENGTH, np.int32)
    counted = draw.integers(0, 2, LENGTH).astype(np.float32)
    batch = Batch(
        tokens=tokens[None],
        targets=np.roll(tokens, -1)[None],
        segments=np.zeros((1, LENGTH), np.int32),
        positions=np.arange(LENGTH, dtype=np.int32)[None],
        weights=counted[None],
    )

    def balance(model: Transformer) -> jax.Array:
        objective, sums = batch_loss(model, batch, chunk=5, expert_balance=0.3)
        return objective - sums.loss

    weights = {name: np.asarray(value, np.float64) for name, value in named_arrays(model).items()}
    wanted = naive.imbalance(model.config, weights, tokens, counted)
    assert wanted > 2.1 and 0 < counted.sum() < LENGTH  # of two layers, unevenly used
    value, grads = jax.jit(jax.value_and_grad(balance))(model)
    np.testing.assert_allclose(value, 0.3 * counted.sum() * wanted, rtol=1e-4)
    _, sums = jax.jit(lambda model: batch_loss(model, batch, chunk=5))(model)
    np.testing.assert_allclose(sums.imbalance / sums.targets, wanted / 2, rtol=1e-5)
    for name in ("layers.mlp.router", "layers.attention.v", "embed"):
        grad = named_arrays(grads)[name]
        direction = draw.standard_normal(grad.shape)
        ahead, behind = ({**weights, name: weights[name] + step * direction} for step in (1e-5, -1e-5))
        slope = naive.imbalance(model.config, ahead, tokens, counted)
        slope = (slope - naive.imbalance(model.config, behind, tokens, counted)) * 0.3 * counted.sum() / 2e-5
        scale = float(np.linalg.norm(grad))
        assert scale > 1e-3 and abs(slope - float(np.sum(grad * direction))) < 3e-3 * scale, name
