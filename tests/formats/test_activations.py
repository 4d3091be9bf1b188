"""Rounded activations: what products with them are, which weights take them, and that files say so."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hsai.errors import InputError
from hsai.formats import (
    DenseConfig,
    Int3Config,
    Int4Config,
    Int8Config,
    NMConfig,
    NMInt4Config,
    NMInt8Config,
    OutliersConfig,
    Rounded,
    Runs,
    TernaryConfig,
    VNMInt4Config,
    find_activations,
    project,
    take_activations,
)
from hsai.formats.storage import describe, named_arrays, named_weights, replace_weights, restore
from hsai.models import Transformer, TransformerConfig
from hsai.models.moe import MoEConfig

CONFIG = TransformerConfig(
    vocab=96, embed=64, layers=2, heads=2, kv_heads=1, head_dim=32, mlp=128, max_length=32, dtype="float32"
)
INTEGERS = (Int8Config(), Int4Config(), Int3Config(), TernaryConfig(), NMInt4Config(), NMInt8Config(), VNMInt4Config())


def make_model(format: Any, config: TransformerConfig = CONFIG) -> Transformer:
    """A model whose matrices have a format; gains stay dense."""
    model = Transformer(config, rngs=nnx.Rngs(0))
    matrices = {
        name: param.get_value()
        for name, param in named_weights(model).items()
        if param.get_value().ndim >= (3 if name.startswith("layers.") else 2)
    }
    return replace_weights(model, {name: format.pack(w) for name, w in matrices.items()})


def count_group(format: Any, contraction: int) -> int:
    """Positions that share a scale."""
    return contraction if isinstance(format, Int8Config | NMInt8Config) else format.group


@pytest.mark.parametrize("format", INTEGERS, ids=lambda format: format.format)
@pytest.mark.parametrize("rows", [1, 40])
def test_products_are_those_of_rounded_activations(format: Any, rows: int) -> None:
    """By hand: a scale for each row's group, by the largest, codes of -127 to 127, and the weight as it is."""
    rng = np.random.default_rng(rows)
    contraction, outputs = 256, 128
    w = format.pack(jnp.asarray(rng.standard_normal((contraction, outputs)), jnp.float32))
    x = rng.standard_normal((rows, contraction)) * np.exp(rng.standard_normal((rows, contraction)))
    x[0, :64] = 0
    groups = x.astype(np.float32).reshape(rows, -1, count_group(format, contraction)).astype(np.float64)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / 127
    codes = np.round(np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0))
    wanted = (codes * scale).reshape(rows, contraction) @ np.asarray(w.dense(), np.float64)
    found = project(jnp.asarray(x, jnp.float32), Rounded(w), out_axes=(None, None))
    # A quotient that lies between two codes may go either way.
    slack = 1e-5 * np.abs(x).sum(axis=-1, keepdims=True) + 1.01 * scale.max() * np.abs(np.asarray(w.dense())).max()
    assert np.median(np.abs(found - wanted)) < 1e-4 * np.abs(wanted).max()
    assert np.all(np.abs(found - wanted) < slack)
    assert np.abs(found - project(jnp.asarray(x, jnp.float32), w, out_axes=(None, None))).max() > 0


@pytest.mark.parametrize("format", [Int4Config(), OutliersConfig(base=Int4Config())], ids=lambda format: format.format)
def test_a_model_answers_nearly_as_before(format: Any) -> None:
    model = make_model(format)
    rounded = take_activations(model, "int8")
    assert find_activations(model) == "float" and find_activations(rounded) == "int8"
    tokens = jnp.arange(16)[None]
    exact, near = (each.logits(each(tokens)[0]) for each in (model, rounded))
    error = float(jnp.linalg.norm(exact - near) / jnp.linalg.norm(exact))
    assert 1e-4 < error < 0.03


def test_runs_are_rounded_where_they_are_of_integers() -> None:
    model = make_model(Int4Config())
    parts = tuple(f.pack(jnp.ones((1, 64, 128))) for f in (Int4Config(), DenseConfig(dtype="float32")))
    model = replace_weights(model, {"layers.mlp.up": Runs(parts)})
    rounded = named_weights(take_activations(model, "int8"))["layers.mlp.up"].get_value()
    assert isinstance(rounded.parts[0], Rounded) and isinstance(rounded.parts[1], jax.Array)
    assert find_activations(take_activations(model, "int8")) == "int8"


def test_they_are_kept_with_the_weights_and_taken_once() -> None:
    model = take_activations(make_model(NMInt4Config()), "int8")
    records, arrays = describe(model), named_arrays(model)
    assert records["layers.mlp.up"]["format"] == "rounded"
    again = restore(Transformer(CONFIG, rngs=nnx.Rngs(0)), records, arrays)
    assert find_activations(again) == "int8"
    for same in (again, take_activations(model, "int8"), take_activations(model, "float")):
        assert describe(same) == records and named_arrays(same).keys() == arrays.keys()


def test_experts_take_them_as_they_are() -> None:
    model = make_model(Int4Config(), dataclasses.replace(CONFIG, moe=MoEConfig(experts=2, active=1)))
    records = describe(take_activations(model, "int8"))
    assert all(records[f"layers.mlp.{name}"]["format"] == "int4" for name in ("gate", "up", "down"))
    assert records["layers.attention.q"]["format"] == "rounded"


@pytest.mark.parametrize("format", [DenseConfig(), NMConfig()], ids=lambda format: format.format)
def test_a_model_without_integers_is_refused(format: Any) -> None:
    with pytest.raises(InputError, match="activations=int8 is for products with weights of integers"):
        take_activations(make_model(format), "int8")


def test_records_that_round_what_is_no_integer_are_refused() -> None:
    model = make_model(NMConfig())
    records = describe(model)
    records["embed"] = {"format": "rounded", "base": records["embed"]}
    arrays = {name.replace("embed.", "embed.base."): array for name, array in named_arrays(model).items()}
    with pytest.raises(InputError, match="'embed' is rounded, which is for integers, not for nm"):
        restore(Transformer(CONFIG, rngs=nnx.Rngs(0)), records, arrays)
