"""Experts: both ways to compute them agree, on any mesh, with weights in any format, and no token is dropped."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hsai.compress import RecipeConfig, compress
from hsai.compress.recipe import Rule
from hsai.errors import InputError
from hsai.formats import Int4Config, NMConfig, to_dense
from hsai.formats.storage import named_arrays, named_weights, replace_weights
from hsai.models import MoEConfig, Transformer, TransformerConfig
from hsai.models.layers import is_matrix
from hsai.models.moe import MoE
from hsai.sharding import MeshConfig, array_sharding, check_mesh, make_mesh, tree_shardings, use_mesh
from hsai.train.flops import matmul_parameter_count, parameter_count
from hsai.train.formats import FormatRule, see_packed
from tests.models.conftest import SMALL, MakeModel

MODEL = TransformerConfig(**SMALL | {"mlp": 16, "vocab": 64, "moe": MoEConfig(experts=8, active=3)})
TOKENS = np.random.default_rng(0).integers(0, 61, (4, 6), np.int32)


def change(**changes: Any) -> TransformerConfig:
    return TransformerConfig(**vars(MODEL) | changes)


def loss(model: Transformer, tokens: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(model.logits(model(tokens)[0])))


def make_moe(config: TransformerConfig) -> MoE:
    assert config.moe is not None
    return MoE(config, config.moe, rngs=nnx.Rngs(0))


def test_all_to_one_expert_drops_no_token() -> None:
    """The worst case of a router: with a capacity, most of these tokens would go nowhere."""
    moe = make_moe(change(moe=MoEConfig(experts=8, active=1)))
    router = np.zeros((32, 8), np.float32)
    router[0, 5] = 1.0
    moe = replace_weights(moe, {"router": jnp.asarray(router)})
    x = np.abs(np.random.default_rng(1).standard_normal((2, 50, 32))).astype(np.float32) + 1
    chosen, weights = moe.route(x)
    assert (chosen == 5).all() and (weights == 1).all()
    hidden = jax.nn.silu(x @ moe.gate[5]) * (x @ moe.up[5])
    np.testing.assert_allclose(jax.jit(moe)(x), hidden @ moe.down[5], rtol=0, atol=1e-5)


def test_imbalance_is_one_where_all_are_likely_alike_and_the_number_of_experts_where_one_is_sure() -> None:
    moe = make_moe(change(moe=MoEConfig(experts=8, active=1)))
    x = np.abs(np.random.default_rng(1).standard_normal((2, 50, 32))).astype(np.float32) + 1
    counted = np.random.default_rng(2).integers(0, 2, (2, 50)).astype(np.float32)
    for size, wanted in ((0.0, 1.0), (1e3, 8.0)):
        router = np.zeros((32, 8), np.float32)
        router[0, 5] = size
        sure = replace_weights(moe, {"router": jnp.asarray(router)})
        np.testing.assert_allclose(sure.imbalance(x, counted), wanted, rtol=1e-6)
        grads = jax.grad(lambda moe: moe.imbalance(x, jnp.zeros((2, 50))))(sure)
        assert sure.imbalance(x, jnp.zeros((2, 50))) == 0 and not np.any(grads.router[...])


@pytest.mark.parametrize("tokens", [1, 2, 3, 11])
def test_reading_chosen_experts_is_sorting_by_them(tokens: int) -> None:
    moe = make_moe(MODEL)
    x = np.random.default_rng(1).standard_normal((tokens, 32)).astype(np.float32)
    chosen, weights = (part[0] for part in moe.route(x[None]))
    parts = (moe.gate[...], moe.up[...], moe.down[...])
    some = tuple(part[2:6] for part in parts)  # what a device has of them
    for shift, experts in ((0, parts), (2, some)):
        found = jax.jit(moe._gather)(x, chosen - shift, weights, *experts)
        wanted = jax.jit(moe._sort)(x, chosen - shift, weights, *experts)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert np.abs(wanted).max() > 0


def test_few_tokens_read_few_experts() -> None:
    """One token of a model with many experts: far less arithmetic than all of them, and no ragged product."""
    moe = make_moe(change(mlp=64, moe=MoEConfig(experts=64, active=2)))
    program = jax.jit(moe).lower(np.ones((1, 1, 32), np.float32)).compile()
    assert program.cost_analysis()["flops"] < 10 * 2 * 3 * 32 * 64 * 2


@pytest.mark.parametrize("experts", [8, 6])
@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, model=2), dict(data=1, fsdp=1, model=4)], ids=str)
def test_a_mesh_computes_what_one_device_does(sizes: dict[str, int], experts: int) -> None:
    """6 experts do not divide by 4 devices, which then have a part of each expert's width."""
    config = change(moe=MoEConfig(experts=experts, active=3))
    model = Transformer(config, rngs=nnx.Rngs(0))
    wanted, grads = jax.jit(jax.value_and_grad(loss))(model, TOKENS)
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: sizes["data"] * sizes["fsdp"] * sizes["model"]])
    shardings = tree_shardings(model, mesh)
    split_experts = experts % sizes["model"] == 0
    spec = shardings.layers.mlp.gate.get_value().spec
    assert (spec[1], spec[3]) == (("model", None) if split_experts else (None, "model"))
    with use_mesh(mesh):
        placed = jax.device_put(model, shardings)
        tokens = jax.device_put(TOKENS, array_sharding(mesh, ("batch", "seq"), TOKENS.shape))
        found, split = jax.jit(jax.value_and_grad(loss))(placed, tokens)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for name, grad in named_arrays(split).items():
        scale = float(jnp.abs(named_arrays(grads)[name]).max())
        np.testing.assert_allclose(grad, named_arrays(grads)[name], rtol=0, atol=2e-5 * scale, err_msg=name)


def test_a_mesh_must_divide_the_experts() -> None:
    mesh = make_mesh(MeshConfig(data=1, model=4), jax.devices()[:4])
    check_mesh(mesh, change(mlp=18).axis_sizes)
    with pytest.raises(InputError, match="mesh.model=4 does not divide model.experts=6"):
        check_mesh(mesh, change(moe=MoEConfig(experts=6, active=3)).axis_sizes)


def test_packed_experts_are_the_numbers_that_they_stand_for() -> None:
    config = change(embed=64, mlp=64, head_dim=16)
    model = Transformer(config, rngs=nnx.Rngs(0))
    recipe = RecipeConfig(
        rules=(
            Rule(pattern="layers.mlp.router", format=Int4Config(group=32)),
            Rule(pattern="layers.mlp.down", format=NMConfig(n=2)),
            Rule(pattern="layers.mlp.*", format=Int4Config(group=32)),
        )
    )
    packed, _ = compress(model, recipe)
    kinds = {name: type(param.get_value()).__name__ for name, param in named_weights(packed).items()}
    assert {name: kind for name, kind in kinds.items() if name.startswith("layers.mlp.")} == {
        "layers.mlp.router": "Int4",
        "layers.mlp.gate": "Int4",
        "layers.mlp.up": "Int4",
        "layers.mlp.down": "NM",
    }
    dense = replace_weights(
        packed, {name: to_dense(param.get_value()) for name, param in named_weights(packed).items()}
    )
    forward = jax.jit(lambda model, tokens: model.logits(model(tokens)[0]))
    for tokens in (TOKENS, TOKENS[:1, :2]):
        np.testing.assert_allclose(forward(packed, tokens), forward(dense, tokens), rtol=0, atol=1e-4)


def test_sparse_training_masks_experts_too(make_model: MakeModel) -> None:
    rule = FormatRule(pattern="layers.mlp.[gud]*", format=NMConfig(n=2, m=4))
    model = see_packed(Transformer(change(mlp=32), rngs=nnx.Rngs(0)), (rule,))
    for name in ("gate", "up", "down"):
        w = np.asarray(getattr(model.layers.mlp, name)[...])
        assert ((w.reshape(2, 8, -1, 4, w.shape[-1]) != 0).sum(axis=3) <= 2).all(), name


def test_experts_are_matrices_and_active_ones_are_counted() -> None:
    model = Transformer(MODEL, rngs=nnx.Rngs(0))
    matrices = {name for name, param in named_weights(model).items() if is_matrix(param)}
    assert matrices >= {f"layers.mlp.{name}" for name in ("router", "gate", "up", "down")}
    assert not any("norm" in name for name in matrices)
    dense = change(moe=None)
    assert parameter_count(MODEL) - parameter_count(dense) == 2 * (7 * 3 * 32 * 16 + 32 * 8)
    assert matmul_parameter_count(MODEL) - matmul_parameter_count(dense) == 2 * (2 * 3 * 32 * 16 + 32 * 8)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"experts": 0, "active": 1}, "moe.experts=0 must be at least 1"),
        ({"experts": 4, "active": 5}, "moe.active=5 must be between 1 and moe.experts=4"),
        ({"experts": 4, "active": 0}, "moe.active=0 must be between 1 and moe.experts=4"),
    ],
)
def test_what_cannot_be_is_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MoEConfig(**sizes)
