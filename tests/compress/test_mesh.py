"""Compression on a mesh of eight devices: matrices are split over them, and the result is that of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hsai.compress import Ledger, RecipeConfig, Rule, compress
from hsai.compress.allocate import AllocationConfig
from hsai.compress.calibration import CalibrationConfig, draw_windows
from hsai.compress.reconstruct import ReconstructionConfig
from hsai.compress.rotation import RotationConfig, rotate_model
from hsai.compress.scaling import ScalingConfig
from hsai.compress.solvers import FeedbackConfig
from hsai.compress.stream import stream_blocks
from hsai.compress.wanda import WandaConfig
from hsai.formats import (
    Int4Config,
    Int8Config,
    NMInt4Config,
    OutliersConfig,
    UnstructuredInt4Config,
    VNMInt4Config,
    to_dense,
)
from hsai.formats.storage import named_weights
from hsai.models import MoEConfig, Transformer, TransformerConfig
from hsai.sharding import MeshConfig, make_mesh, tree_shardings, use_mesh

CONFIG = TransformerConfig(
    vocab=96, embed=64, layers=1, heads=2, kv_heads=2, head_dim=32, mlp=128, max_length=64, dtype="float32"
)
CALIBRATION = CalibrationConfig(tokens=256, sequence_length=32, batch=4)
TOKENS = draw_windows(np.random.default_rng(0).integers(0, 96, 1000), CALIBRATION)
SIZES = {"data": 2, "fsdp": 2, "model": 2}


def on_mesh(model: Transformer):
    """The context of the mesh, and the model on it."""
    mesh = make_mesh(MeshConfig(**SIZES))
    return use_mesh(mesh), jax.device_put(model, tree_shardings(model, mesh))


@pytest.mark.parametrize("moe", [None, MoEConfig(experts=4, active=2)], ids=["dense", "experts"])
def test_matrices_are_split_over_all_devices(moe: MoEConfig | None) -> None:
    model = Transformer(dataclasses.replace(CONFIG, moe=moe), rngs=nnx.Rngs(0))
    seen: list[tuple] = []

    def keep(layer, block, grams, streams):
        seen.append((grams, streams.counts))
        return block

    stream_blocks(model, TOKENS, batch=4, solve=keep)
    context, spread = on_mesh(model)
    with context:
        stream_blocks(spread, TOKENS, batch=4, solve=keep)
    (wanted, counts), (found, found_counts) = seen
    assert set(found) == set(wanted) and len(found) == (8 if moe else 7)
    for name, gram in found.items():
        np.testing.assert_allclose(gram, wanted[name], rtol=1e-4, atol=1e-3, err_msg=name)
        np.testing.assert_array_equal(found_counts[name], counts[name])
        parts = {shard.data.size for shard in gram.addressable_shards}
        assert parts == {gram.size // 8}, name


def run(model: Transformer, recipe: RecipeConfig) -> tuple[dict[str, np.ndarray], Ledger]:
    packed, ledger = compress(model, recipe, calibration=TOKENS)
    return {name: np.asarray(to_dense(param.get_value())) for name, param in named_weights(packed).items()}, ledger


def test_the_result_is_that_of_one_device() -> None:
    """Sums over tokens are made in another order, so a weight that lies between two levels may go the other way, and
    take those behind it along: of every weight 99 % are the same, and errors agree to a hundredth."""
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    for seed, norm in enumerate((model.layers.attention_norm, model.layers.mlp_norm)):
        norm.gain.set_value(jnp.exp(2.0 * jax.random.normal(jax.random.key(seed), (1, 64))))
    format, sparse = Int4Config(group=32), UnstructuredInt4Config(group=32)
    recipe = RecipeConfig(
        rules=(
            Rule(pattern="layers.mlp.up", format=format, solver=FeedbackConfig(order="activations")),
            Rule(pattern="layers.mlp.down", format=OutliersConfig(base=sparse), solver=FeedbackConfig()),
            Rule(pattern="layers.mlp.gate", format=NMInt4Config(group=32), solver=WandaConfig()),
            Rule(pattern="layers.attention.q", format=NMInt4Config(group=32), solver=FeedbackConfig()),
            Rule(pattern="layers.attention.v", format=VNMInt4Config(v=16, m=8, group=32), solver=FeedbackConfig()),
            Rule(pattern="layers.attention.o", format=format),
        ),
        transforms=(ScalingConfig(steps=4),),
        calibration=CALIBRATION,
    )
    wanted, ledger = run(model, recipe)
    context, spread = on_mesh(model)
    with context:
        found, found_ledger = run(spread, recipe)
    assert [row.exponent for row in found_ledger.scales] == [row.exponent for row in ledger.scales]
    assert list(found) == list(wanted)
    for name, w in wanted.items():
        same = np.isclose(found[name], w, rtol=1e-2, atol=1e-3 * np.abs(w).max())
        assert same.mean() >= 0.99, (name, same.mean())
    assert len(ledger.layers) == 6 and any(row.exponent for row in ledger.scales)
    for one, other in zip(found_ledger.layers, ledger.layers, strict=True):
        assert one.output_error == pytest.approx(other.output_error, rel=1e-2) and one.damping == other.damping
    assert found_ledger.bytes == ledger.bytes


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_a_whole_model_on_eight_devices_is_as_close_as_that_of_one(sizes: tuple[int, int, int]) -> None:
    """All weights of four layers and the table, each layer behind the packed ones before it, with a batch that does not
    divide by eight. Where a level goes the other way, the layers behind see something else, and their levels follow:
    what stays the same is the first layer, and how far outputs and predictions are from the dense ones."""
    config = dataclasses.replace(CONFIG, layers=4, heads=4, kv_heads=4, head_dim=16)
    model = Transformer(config, rngs=nnx.Rngs(0))
    rule = Rule(pattern="*", format=Int4Config(group=32), solver=FeedbackConfig())
    recipe = RecipeConfig(rules=(rule,), calibration=CALIBRATION)
    one, ledger = compress(model, recipe, calibration=TOKENS)
    mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "model"), sizes, strict=True))))
    with use_mesh(mesh):
        spread, spread_ledger = compress(jax.device_put(model, tree_shardings(model, mesh)), recipe, calibration=TOKENS)
    eight = jax.device_put(spread, jax.devices()[0])
    for (name, wanted), found in zip(named_weights(one).items(), named_weights(eight).values(), strict=True):
        if name.startswith("layers.") and "norm" not in name:
            first, other = (np.asarray(to_dense(w.get_value())[0]) for w in (wanted, found))
            same = np.isclose(other, first, rtol=1e-2, atol=1e-3 * np.abs(first).max())
            assert same.mean() >= 0.99, (name, same.mean())
    dense, first, other = (np.asarray(m.logits(m(TOKENS)[0]), np.float64) for m in (model, one, eight))
    assert np.linalg.norm(other - dense) == pytest.approx(np.linalg.norm(first - dense), rel=0.01)
    assert len(ledger.layers) == 4 * 7 + 1
    for row, wanted in zip(spread_ledger.layers, ledger.layers, strict=True):
        assert row.output_error == pytest.approx(wanted.output_error, rel=0.05), row.weight


def test_turns_are_the_same_on_a_mesh() -> None:
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    wanted = rotate_model(model, RotationConfig(untie=True))
    context, spread = on_mesh(model)
    with context:
        found = rotate_model(spread, RotationConfig(untie=True))
    for name, param in named_weights(wanted).items():
        np.testing.assert_allclose(named_weights(found)[name].get_value(), param.get_value(), rtol=0, atol=1e-6)


def test_budgets_and_tuned_layers_on_a_mesh() -> None:
    """Sensitivities of experts, whose gradients come out of each device's part; and each layer tuned. Labels are drawn
    alike; of what is tuned in float32 steps, the distance to the dense model is."""
    model = Transformer(dataclasses.replace(CONFIG, moe=MoEConfig(experts=4, active=2), mlp=32), rngs=nnx.Rngs(0))
    formats = (Int8Config(), Int4Config(group=32))
    recipe = RecipeConfig(
        rules=(Rule(pattern="layers.mlp.[ud]*", format=formats, solver=FeedbackConfig()),),
        calibration=CALIBRATION,
        allocation=AllocationConfig(bits_per_weight=23.3, windows=4),
        reconstruction=ReconstructionConfig(steps=2),
    )
    _, ledger = run(model, recipe)
    context, spread = on_mesh(model)
    with context:
        _, found = run(spread, recipe)
    assert found.allocation.chosen == ledger.allocation.chosen
    for one, other in zip(found.allocation.items, ledger.allocation.items, strict=True):
        for option, wanted in zip(one.options, other.options, strict=True):
            assert option.loss == pytest.approx(wanted.loss, rel=0.02) and wanted.loss > 0
    assert found.blocks[0].error_solved == pytest.approx(ledger.blocks[0].error_solved, rel=0.02)
    assert found.blocks[0].error_tuned == pytest.approx(ledger.blocks[0].error_tuned, rel=0.05)
