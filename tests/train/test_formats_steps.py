"""Whole steps of training as if packed: the pull of masks, learned scales, meshes, packing what was trained."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hsai.compress import RecipeConfig, Rule, compress
from hsai.compress.held import find_scale
from hsai.errors import InputError
from hsai.formats import (
    NM,
    FormatConfig,
    Int4,
    Int4Config,
    Int4OffsetConfig,
    Int8Config,
    NMConfig,
    NMInt4Config,
    OutliersConfig,
    TernaryConfig,
    UnstructuredInt8Config,
    VNMInt4Config,
    is_packed_as,
    to_dense,
)
from hsai.formats.storage import named_arrays, named_weights, replace_weights
from hsai.models import Transformer, TransformerConfig
from hsai.sharding import MeshConfig, make_mesh, tree_shardings, use_mesh
from hsai.train.formats import FormatRule, Rules, begin, match_formats, pack_trained, see_packed
from hsai.train.loop import TrainConfig
from hsai.train.optimizer import OptimizerConfig, make_optimizer, matrix_mask
from hsai.train.state import TrainState, build_state, init_state
from hsai.train.step import make_train_step
from tests.train.batches import MODEL, SMALL, draw_batch, place
from tests.train.rules import SPARSE24, in_blocks, keep_largest, one


@pytest.fixture(scope="module")
def model() -> Transformer:
    return jax.jit(lambda: Transformer(MODEL, rngs=nnx.Rngs(0)))()


def descend(model: Transformer, accumulate: int, rules: Rules) -> dict[str, np.ndarray]:
    """The gradient of one training step on a batch with padding."""
    config = TrainConfig(batch_size=8, loss_chunk=8, accumulate=accumulate, formats=rules)
    copy = jax.tree.map(jnp.copy, model)
    state = TrainState(jnp.zeros((), jnp.int32), copy, optax.sgd(1.0).init(copy))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(optax.sgd(1.0), optax.constant_schedule(1.0), config, shardings)
    after, _ = step(state, draw_batch(0))
    return {name: np.asarray(x - named_arrays(after.model)[name]) for name, x in named_arrays(model).items()}


def test_the_pull_is_the_same_for_every_batch_however_it_is_cut(model: Transformer) -> None:
    """The loss is a sum that is divided by the number of targets; the pull on weights must not be."""
    plain = descend(model, 1, (dataclasses.replace(SPARSE24, decay=0.0),))
    pulled = descend(model, 4, (dataclasses.replace(SPARSE24, decay=0.5),))
    for name, array in named_arrays(model).items():
        dense = np.asarray(array)
        pull = 0.5 * np.where(keep_largest(dense, 2), 0, dense) if in_blocks(name) else np.zeros_like(dense)
        np.testing.assert_allclose(pulled[name] - plain[name], pull, rtol=0, atol=2e-6, err_msg=name)


def walk(
    state: TrainState, rules: Rules, steps: int = 4, optimizer: optax.GradientTransformation | None = None
) -> tuple[TrainState, list[float]]:
    """Some steps on one batch, of Adam unless told otherwise, and their losses."""
    optimizer = optimizer or optax.adam(3e-3)
    config = TrainConfig(steps=steps, batch_size=8, loss_chunk=16, formats=rules)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(optimizer, optax.constant_schedule(3e-3), config, shardings)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, draw_batch(0))
        losses.append(float(metrics["loss"]))
    return state, losses


EVERYTHING: dict[str, Rules] = {
    "nm": one(NMConfig()),
    "int4": (FormatRule(pattern="*", format=Int4Config(group=32)),),
    "int4 learned": (FormatRule(pattern="*", format=Int4Config(group=32), scales="learned"),),
    "int4_offset learned": one(Int4OffsetConfig(group=32), scales="learned"),
    "int8 learned": one(Int8Config(), scales="learned"),
    "ternary": one(TernaryConfig(group=64)),
    "ternary learned": one(TernaryConfig(group=None), scales="learned"),
    "nm_int4": one(NMInt4Config(group=32)),
    "nm_int4 fixed and learned": one(NMInt4Config(group=32), scales="learned", masks="fixed"),
    "vnm_int4 learned": one(VNMInt4Config(v=16, group=32), scales="learned"),
    "unstructured_int8 fixed and learned": one(UnstructuredInt8Config(), scales="learned", masks="fixed"),
    "several": (
        FormatRule(pattern="layers.mlp.*", format=NMConfig(dtype="float32"), masks="fixed"),
        FormatRule(pattern="layers.attention.[qkv]", format=TernaryConfig(group=32)),
        FormatRule(pattern="embed", format=Int8Config()),
    ),
}


@pytest.mark.parametrize("rules", EVERYTHING.values(), ids=EVERYTHING)
def test_what_was_trained_as_if_packed_packs_without_loss(rules: Rules) -> None:
    state = jax.jit(lambda: build_state(MODEL, optax.adam(3e-3), 1, rules))()
    state, losses = walk(state, rules)
    assert losses[-1] < losses[0]

    seen, packed = jax.jit(lambda model: see_packed(model, rules))(state.model), pack_trained(state.model, rules)
    matched = match_formats(rules, MODEL)
    for name, param in named_weights(packed).items():
        value = param.get_value()
        assert np.array_equal(to_dense(value), named_arrays(seen)[name]), name
        assert is_packed_as(value, matched[name].format) if name in matched else isinstance(value, jax.Array)
    tokens = draw_batch(3).tokens
    forward = jax.jit(lambda model: model.logits(model(tokens)[0]))
    np.testing.assert_allclose(forward(packed), forward(seen), rtol=0, atol=1e-5)  # the same products, summed otherwise

    # And the recipe of the same formats takes it as it is.
    recipe = RecipeConfig(rules=tuple(Rule(pattern=rule.pattern, format=rule.format) for rule in rules))
    again, ledger = compress(packed, recipe)
    for name, array in named_arrays(packed).items():
        assert np.array_equal(named_arrays(again)[name], array), name
    assert {row.weight: row.relative_error for row in ledger.rows} == {
        name: None if name in matched else 0 for name in named_weights(packed)
    }


@pytest.mark.parametrize("scales", ["derived", "learned"])
@pytest.mark.parametrize(
    "format", [Int4Config(group=32), NMInt4Config(group=32), VNMInt4Config(v=16, group=32)], ids=lambda f: f.format
)
def test_training_begins_from_what_was_packed(model: Transformer, format: FormatConfig, scales: str) -> None:
    """Learned scales and fixed masks go on where a solver left off, not where a search would begin."""
    fixed = hasattr(format, "mask")
    rules = one(format, scales=scales, masks="fixed" if fixed else "magnitude")
    draw = np.random.default_rng(0)

    def solve(w: jax.Array) -> Any:
        mask = format.mask(jnp.asarray(draw.standard_normal(w.shape))) if fixed else None  # no magnitudes
        scale = find_scale(w, format, mask)
        words = {"scale": scale * 0.6} if mask is None else {"scale": scale * 0.6, "mask": mask}
        return format.pack(w, **words)

    names = match_formats(rules, MODEL)
    packed = replace_weights(model, {name: solve(named_weights(model)[name].get_value()) for name in names})
    optimizer = optax.adam(3e-3)
    start = begin(packed, rules)
    seen = named_arrays(see_packed(start, rules))
    kept = {name: named_weights(packed)[name].get_value().kept() for name in names}
    for name in names:
        held = to_dense(named_weights(packed)[name].get_value())
        if scales == "learned":
            assert np.array_equal(seen[name], held), name
        elif fixed:
            assert not np.any(np.asarray(seen[name])[~np.asarray(kept[name])]), name
    if fixed:
        # Copies: a step takes over the memory of its state, and some of this is the fixture's.
        state = TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, start), optimizer.init(start))
        after, losses = walk(state, rules)
        assert losses[-1] < losses[0]
        trained = named_weights(pack_trained(after.model, rules))
        zeros = [np.mean(np.asarray(to_dense(trained[name].get_value())) == 0) for name in names]
        assert min(zeros) >= 0.5
        for name in names:
            assert np.array_equal(trained[name].get_value().kept(), kept[name]), name


def test_scales_are_learned_and_not_decayed(model: Transformer) -> None:
    rules = one(Int4Config(group=32), scales="learned")
    start = begin(model, rules)
    marks = named_arrays(matrix_mask(start))
    assert marks["layers.mlp.up.values"] is True and marks["layers.mlp.up.exponent"] is False
    assert marks["layers.mlp.up.sign"] is False
    assert marks["embed"] is True and marks["layers.mlp_norm.gain"] is False
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3, warmup_steps=0, weight_decay=0.1), 100)
    state = TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, start), optimizer.init(start))
    state, _ = walk(state, rules, optimizer=optimizer)
    for name, array in named_arrays(state.model).items():
        if name.endswith("sign"):
            np.testing.assert_array_equal(array, named_arrays(start)[name])
            assert set(np.unique(array)) == {-1, 1}
        if name.endswith("exponent"):
            moved = np.abs(array - named_arrays(start)[name])
            assert 0.002 < moved.mean() < 0.02, name  # about the learning rate a step: a share of the scale


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_losses_are_the_same_on_every_mesh(sizes: tuple[int, int, int]) -> None:
    rules = (
        FormatRule(pattern="layers.mlp.*", format=NMInt4Config(group=32), scales="learned"),
        FormatRule(pattern="layers.*", format=Int4Config(group=32)),
        FormatRule(pattern="embed", format=Int8Config()),
    )
    config = TrainConfig(steps=4, batch_size=8, loss_chunk=8, formats=rules)

    def run(sizes: tuple[int, int, int]) -> list[float]:
        data, fsdp, parts = sizes
        mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, model=parts), jax.devices()[: data * fsdp * parts])
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=1), 4)
        with use_mesh(mesh):
            state = init_state(MODEL, optimizer, mesh, 0, rules)
            step = make_train_step(optimizer, optax.constant_schedule(1e-3), config, tree_shardings(state, mesh))
            losses = []
            for index in range(4):
                state, metrics = step(state, place(draw_batch(index), mesh))
                losses.append(float(metrics["loss"]))
        return losses

    np.testing.assert_allclose(run(sizes), run((1, 1, 1)), rtol=1e-4)


def test_rules_that_cannot_be_are_refused_before_training() -> None:
    with pytest.raises(InputError, match="sparsity 3:8 is not supported; valid are 1:4, 2:4, 3:4, 1:8, 2:8 and 4:8"):
        one(NMConfig(n=3, m=8))
    with pytest.raises(InputError, match="decay=-1 must be at least 0"):
        one(NMConfig(), decay=-1)
    with pytest.raises(InputError, match="nm has no scales to learn"):
        one(NMConfig(), scales="learned")
    with pytest.raises(InputError, match="int4 prunes nothing"):
        one(Int4Config(), masks="fixed")
    with pytest.raises(InputError, match="outliers cannot be trained in; leave that to a recipe"):
        one(OutliersConfig())
    with pytest.raises(InputError, match="rule 'layers.mpl' matches no weight"):
        match_formats((FormatRule(pattern="layers.mpl", format=Int8Config()),), MODEL)
    odd = dataclasses.replace(TransformerConfig(**SMALL), mlp=72)
    with pytest.raises(InputError, match="layers.mlp.down: 2:4 sparsity needs a contraction .* multiple of 32; .* 72"):
        match_formats((SPARSE24,), odd)


def test_a_trained_sparse_model_can_be_quantized_and_a_quantized_one_cannot(model: Transformer) -> None:
    sparse = pack_trained(model, one(NMConfig()))
    assert isinstance(sparse.layers.mlp.up.get_value(), NM)
    recipe = RecipeConfig(rules=(Rule(pattern="layers.*", format=NMInt4Config(group=32)),))
    found, _ = compress(sparse, recipe)
    kept = found.layers.mlp.up.get_value().kept()
    assert np.array_equal(kept, sparse.layers.mlp.up.get_value().kept())
    low = pack_trained(model, one(Int4Config(group=32)))
    assert isinstance(low.layers.mlp.up.get_value(), Int4)
    with pytest.raises(InputError, match="layers.attention.[a-z] is int4 already"):
        compress(low, recipe)
