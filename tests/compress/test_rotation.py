"""Turns that are folded into weights: the model computes the same function, in axes without outliers."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from hsai.compress import RecipeConfig, Rule, compress, plan_recipe
from hsai.compress.one_shot import measure_error
from hsai.compress.plain import pack_weight
from hsai.compress.rotation import RotationConfig, make_turn, rotate_model
from hsai.compress.scaling import ScalingConfig
from hsai.errors import InputError
from hsai.formats import Int4Config, Int8, Int8Config
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import abstract_transformer
from tests.models import naive
from tests.models.conftest import SMALL, fill_model
from tests.models.test_transformer_values import FAMILIES

STRUCTURES = {
    name: FAMILIES[name]
    for name in (
        "llama, tied",
        "llama, untied",
        "as many kv heads as heads",
        "one kv head",
        "heads wider than the stream",
        "qwen",
        "qwen 2",
        "gains on top of one",
        "norms behind",
        "scaled embeddings",
        "gemma 3",
        "mixtral",
    )
}
"""Families that differ in what is folded into what."""

TOKENS = np.array([5, 60, 0, 5, 17, 33, 8, 21, 40], np.int32)


def naive_logits(model: Transformer) -> np.ndarray:
    """In float64, by what the weights are and not by what hsai makes of them."""
    weights = {name: np.asarray(param.get_value()) for name, param in named_weights(model).items()}
    return naive.logits(model.config, weights, TOKENS)


@pytest.mark.parametrize("size", [1, 2, 8, 3, 9, 12, 36, 576])
def test_turns_are_orthogonal_and_flat(size: int) -> None:
    turn = make_turn(size, np.random.default_rng(0)).astype(np.float64)
    np.testing.assert_allclose(turn @ turn.T, np.eye(size), atol=1e-6)
    assert np.abs(turn).max() <= (2 / size) ** 0.5 + 1e-6
    if size & (size - 1) == 0:
        np.testing.assert_allclose(np.abs(turn), size**-0.5, rtol=1e-6)
    if size > 8:
        other = make_turn(size, np.random.default_rng(1))
        assert (np.sign(turn[:, 0]) != np.sign(other[:, 0])).any()


@pytest.mark.parametrize("changes", STRUCTURES.values(), ids=list(STRUCTURES))
def test_the_function_stays(changes: dict[str, Any]) -> None:
    """Of families that normalize what blocks add, only heads can be turned."""
    model = fill_model(**changes)
    residual = not model.config.post_norm
    turned = rotate_model(model, RotationConfig(residual=residual, untie=residual))
    tied = model.config.tie_embeddings and not residual
    assert turned.config == dataclasses.replace(model.config, tie_embeddings=tied)
    np.testing.assert_allclose(naive_logits(turned), naive_logits(model), rtol=0, atol=1e-4)
    before, after = named_weights(model), named_weights(turned)
    changed = {name for name in before if (before[name].get_value() != after[name].get_value()).any()}
    assert changed >= {"layers.attention.v", "layers.attention.o"}
    assert ("layers.attention.v_bias" in changed) == model.config.qkv_bias
    assert (changed >= {"embed", "layers.attention.q", "layers.mlp.gate", "layers.mlp.down"}) == residual
    for norm in ("layers.attention_norm", "layers.mlp_norm", "final_norm"):
        gain = np.asarray(after[f"{norm}.gain"].get_value()) + model.config.norm_plus_one
        assert (gain == 1).all() == residual, norm


def test_a_tied_head_needs_a_table_of_its_own_or_one_gain() -> None:
    model = fill_model()
    message = (
        "final_norm has gains from .* the head is the embedding table: rotation untie=True gives it a table of its own "
        r"\(1,952 weights more\)"
    )
    with pytest.raises(InputError, match=message):
        rotate_model(model, RotationConfig())
    even = replace_weights(model, {"final_norm.gain": jnp.full(32, 1.5)})
    turned = rotate_model(even, RotationConfig())
    assert turned.config == model.config and "unembed" not in named_weights(turned)
    np.testing.assert_allclose(naive_logits(turned), naive_logits(even), rtol=0, atol=1e-4)
    heads = rotate_model(model, RotationConfig(residual=False))
    np.testing.assert_array_equal(heads.embed.get_value(), model.embed.get_value())


def test_what_cannot_be_turned_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot be turned: .* \(post_norm\).*residual=False"):
        rotate_model(fill_model(post_norm=True), RotationConfig(untie=True))
    with pytest.raises(InputError, match="turns nothing"):
        RotationConfig(residual=False, heads=False)
    with pytest.raises(InputError, match="untie=True is for the turn of the residual stream"):
        RotationConfig(residual=False, untie=True)
    rules = (Rule(pattern="*", format=Int8Config()),)
    with pytest.raises(InputError, match=r"\(rotation, rotation\) name one kind twice"):
        RecipeConfig(rules=rules, transforms=(RotationConfig(), RotationConfig(seed=1)))
    with pytest.raises(InputError, match="let it come first"):
        RecipeConfig(rules=rules, transforms=(ScalingConfig(), RotationConfig()))
    recipe = RecipeConfig(rules=rules, transforms=(RotationConfig(untie=True),))
    with pytest.raises(InputError, match="post_norm"):
        plan_recipe(recipe, abstract_transformer(TransformerConfig(**SMALL | {"post_norm": True})))
    model = fill_model()
    packed = replace_weights(model, {"layers.mlp.up": Int8Config().pack(model.layers.mlp.up.get_value())})
    with pytest.raises(InputError, match="layers.mlp.up is packed already"):
        plan_recipe(recipe, packed)


def test_seeds_and_dtypes() -> None:
    model = fill_model(tie_embeddings=False)
    first, again, other = (rotate_model(model, RotationConfig(seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.embed.get_value(), again.embed.get_value())
    assert (first.embed.get_value() != other.embed.get_value()).any()
    assert (first.layers.attention.v.get_value() != other.layers.attention.v.get_value()).any()
    narrow = replace_weights(model, {"layers.mlp.up": model.layers.mlp.up.get_value().astype(jnp.bfloat16)})
    assert rotate_model(narrow, RotationConfig()).layers.mlp.up.get_value().dtype == jnp.bfloat16


def test_a_channel_that_stands_out_no_longer_spoils_its_group() -> None:
    """One of 32 with thirty times the gain, which moves into the weight in either case."""
    model = fill_model(tie_embeddings=False)
    gains = jnp.ones((2, 32)).at[:, 3].set(30.0)
    turned = rotate_model(replace_weights(model, {"layers.mlp_norm.gain": gains}), RotationConfig())
    format, errors = Int4Config(group=32), []
    for w in (model.layers.mlp.gate.get_value() * gains[..., None], turned.layers.mlp.gate.get_value()):
        errors.append(float(measure_error(w, pack_weight(w, format))))
    assert errors[1] < 0.6 * errors[0], errors


def test_a_recipe_turns_before_it_packs() -> None:
    """The head's new table is a weight like any other: rules match it, and the ledger counts it."""
    model = fill_model()
    recipe = RecipeConfig(rules=(Rule(pattern="*", format=Int8Config()),), transforms=(RotationConfig(untie=True),))
    packed, ledger = compress(model, recipe)
    assert not packed.config.tie_embeddings and isinstance(packed.unembed.get_value(), Int8)
    assert "unembed" in [row.weight for row in ledger.rows]
    turned = rotate_model(model, RotationConfig(untie=True))
    for name, param in named_weights(packed).items():
        value = param.get_value()
        if isinstance(value, Int8):
            wanted = Int8Config().pack(named_weights(turned)[name].get_value())
            np.testing.assert_array_equal(value.values, wanted.values, err_msg=name)
    assert model.config.tie_embeddings and max(row.relative_error for row in ledger.rows) < 0.02
    assert set(plan_recipe(recipe, abstract_transformer(model.config)).rules) >= {"embed", "unembed"}
