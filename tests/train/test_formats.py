"""Training as if packed: what the forward pass sees, what the gradient is, and that the end packs without loss."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hsai.compress import RecipeConfig, Rule, compress
from hsai.compress.grid import grid_of
from hsai.compress.held import find_mask, find_scale, hold
from hsai.compress.latent import Latent, to_exponent, to_scale
from hsai.compress.one_shot import pack_weight
from hsai.errors import InputError
from hsai.formats import (
    NM,
    DenseConfig,
    FormatConfig,
    Int4,
    Int4Config,
    Int8Config,
    NMConfig,
    NMInt4Config,
    TernaryConfig,
    VNMConfig,
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

FORMATS: list[FormatConfig] = [
    DenseConfig(),
    Int8Config(),
    Int4Config(group=32),
    Int4Config(group=64),
    TernaryConfig(group=32),
    TernaryConfig(group=None),
    NMConfig(n=1, dtype="float32"),
    NMConfig(n=2),
    NMConfig(n=4, m=8),
    NMInt4Config(n=2, m=4, group=32),
    NMInt4Config(n=2, m=8, group=64),
    VNMConfig(v=16),
    VNMInt4Config(v=16, group=32),
]
SPARSE24 = FormatRule(pattern="layers.*", format=NMConfig(n=2, m=4, dtype="float32"))


def one(format: FormatConfig, **how: Any) -> Rules:
    """A rule for all blocks."""
    return (FormatRule(pattern="layers.*", format=format, **how),)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return jax.jit(lambda: Transformer(MODEL, rngs=nnx.Rngs(0)))()


def keep_largest(w: np.ndarray, n: int) -> np.ndarray:
    """Which weights are among the n largest of their 4 along the contraction; loops, of equals the earlier."""
    mask = np.zeros(w.shape, bool)
    for layer, group, column in np.ndindex(w.shape[0], w.shape[1] // 4, w.shape[2]):
        four = np.abs(w[layer, 4 * group : 4 * group + 4, column])
        for index in sorted(range(4), key=lambda index: (-four[index], index))[:n]:
            mask[layer, 4 * group + index, column] = True
    return mask


def in_blocks(name: str) -> bool:
    return name.startswith("layers.") and not name.endswith("gain")


def draw_weight(kind: str) -> jax.Array:
    """(2, 128, 48): what training meets, and what it should not stumble over."""
    draw = np.random.default_rng(len(kind))
    w = draw.standard_normal((2, 128, 48)) * 0.05
    if kind == "outliers":
        w[0, ::17] *= 40
    if kind == "zeros":
        w[:, :64, ::2] = 0
        w[1] = 0
    if kind == "ties":
        w = draw.integers(-3, 4, w.shape) * 0.25
    if kind == "tiny":
        w *= 1e-34  # beyond 1e-38 processors take numbers for zero
    return jnp.asarray(w, jnp.float32)


@pytest.mark.parametrize("kind", ["normal", "outliers", "zeros", "ties", "tiny"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_what_training_sees_is_what_packing_holds(format: FormatConfig, kind: str) -> None:
    w = draw_weight(kind)
    packed = pack_weight(w, format)
    mask = find_mask(w, format)
    scale = find_scale(w, format, mask)
    np.testing.assert_array_equal(hold(w, format, mask=mask, scale=scale), to_dense(packed).astype(jnp.float32))
    if scale is not None:
        np.testing.assert_array_equal(scale, packed.scale)
    kept = None if isinstance(packed, jax.Array) else packed.kept()
    assert (kept is None) == (mask is None)
    if mask is not None:
        np.testing.assert_array_equal(kept, mask)


@pytest.mark.parametrize("n", [1, 2])
def test_the_forward_pass_sees_n_of_every_4(model: Transformer, n: int) -> None:
    sparse = named_arrays(see_packed(model, one(NMConfig(n=n, dtype="float32"))))
    for name, dense in named_arrays(model).items():
        wanted = np.where(keep_largest(np.asarray(dense), n), dense, 0) if in_blocks(name) else dense
        assert np.array_equal(sparse[name], wanted), name
    assert np.mean(np.asarray(sparse["layers.mlp.gate"]) != 0) == n / 4


def weigh(seen: Transformer, factors: dict[str, np.ndarray]) -> jax.Array:
    """A loss with a gradient of its own for each weight."""
    return sum((jnp.sum(factors[name] * x) for name, x in named_arrays(seen).items()), jnp.zeros(()))


def draw_factors(model: Transformer) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = {name: param.get_value().shape for name, param in named_weights(model).items()}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_the_gradient_goes_straight_through_and_pulls_what_is_masked(model: Transformer) -> None:
    """Of sum(c * sparse(w)): c everywhere, and lambda * w where the mask is (2102.04010, eq. 10)."""
    factors, rules = draw_factors(model), (dataclasses.replace(SPARSE24, decay=0.15),)
    grads = jax.jit(jax.grad(lambda model: weigh(see_packed(model, rules), factors)))(model)
    for name, grad in named_arrays(grads).items():
        dense = np.asarray(named_arrays(model)[name])
        pull = 0.15 * np.where(keep_largest(dense, 2), 0, dense) if in_blocks(name) else 0
        np.testing.assert_allclose(grad, factors[name] + pull, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("format", [Int4Config(group=32), TernaryConfig(group=64), Int8Config()], ids=str)
def test_rounding_with_derived_scales_passes_the_gradient_everywhere(model: Transformer, format: FormatConfig) -> None:
    factors = draw_factors(model)
    grads = jax.jit(jax.grad(lambda model: weigh(see_packed(model, one(format)), factors)))(model)
    for name, grad in named_arrays(grads).items():
        np.testing.assert_allclose(grad, factors[name], rtol=1e-6, err_msg=name)


def see_plainly(latent: Latent, format: FormatConfig, mask: jax.Array | None) -> jax.Array:
    """LSQ (1902.08153, eqs. 1 to 5) for jax to differentiate: what is rounded is a constant beside what was."""
    grid = grid_of(format)
    assert grid is not None
    layers, size, outputs = latent.shape
    groups = latent.values.reshape(layers, -1, grid.group or size, outputs)
    # The gradient of a scale is divided by sqrt(number of its weights * highest level); its rounding has none.
    share = 1 / np.sqrt(groups.shape[-2] * grid.high)
    exact = to_scale(latent.exponent)
    stored = jax.lax.stop_gradient(exact.astype(grid.dtype).astype(jnp.float32))
    scale = (stored + share * (exact - jax.lax.stop_gradient(exact)))[..., None, :]
    level = groups / scale
    inside = (level >= grid.low) & (level <= grid.high)
    rounded = level + jax.lax.stop_gradient(jnp.round(level) - level)
    seen = (jnp.where(inside, rounded, jnp.clip(jax.lax.stop_gradient(level), grid.low, grid.high)) * scale).reshape(
        latent.shape
    )
    return seen if mask is None else jnp.where(mask, seen, 0.0)


@pytest.mark.parametrize(
    "format",
    [Int4Config(group=32), TernaryConfig(group=None), NMInt4Config(n=2, m=4, group=32), VNMInt4Config(v=16, group=32)],
    ids=str,
)
def test_learned_scales_and_clipped_weights_have_the_gradients_of_lsq(format: FormatConfig) -> None:
    rules = one(format, scales="learned", decay=0.0)
    config = TransformerConfig(**SMALL)
    start = begin(jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(1)))(), rules)
    # Scales of half the size, so that there is much to clip.
    values = {
        name: dataclasses.replace(param.get_value(), exponent=param.get_value().exponent - 0.9)
        for name, param in named_weights(start).items()
        if name in match_formats(rules, config)
    }
    assert len(values) == 7
    halved = replace_weights(start, values)
    factors = draw_factors(halved)
    grads = named_weights(jax.jit(jax.grad(lambda model: weigh(see_packed(model, rules), factors)))(halved))
    for name, latent in values.items():
        mask = find_mask(latent.values, format)

        def plain(latent: Latent, name: str = name, mask: jax.Array | None = mask) -> jax.Array:
            return jnp.sum(factors[name] * see_plainly(latent, format, mask))

        wanted, found = jax.grad(plain)(latent), grads[name].get_value()
        assert isinstance(found, Latent)
        kept = wanted.values if mask is None else jnp.where(mask, wanted.values, factors[name])
        np.testing.assert_allclose(found.values, kept, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(found.exponent, wanted.exponent, rtol=1e-4, atol=1e-6, err_msg=name)
        assert 0.02 < np.mean(np.asarray(found.values) == 0) < 0.9  # something was clipped, and not everything


def test_a_scale_is_its_exponent_and_back() -> None:
    draw = np.random.default_rng(0)
    scale = jnp.asarray(np.exp(draw.uniform(-60, 20, 10_000)), jnp.bfloat16)
    assert jnp.array_equal(to_scale(to_exponent(scale)).astype(jnp.bfloat16), scale)
    assert jnp.array_equal(to_scale(jnp.asarray([-3.0, 0.0, 0.5, 2.25])), jnp.asarray([0.125, 1.0, 1.5, 5.0]))
    steps = to_scale(jnp.linspace(-9, 3, 5001))
    assert jnp.all(jnp.diff(steps) > 0) and float(jnp.max(steps[1:] / steps[:-1])) < 1.003
    assert jnp.isfinite(to_exponent(jnp.zeros(3))).all()


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


def walk(state: TrainState, rules: Rules, steps: int = 4) -> tuple[TrainState, list[float]]:
    """Some steps of Adam on one batch, and their losses."""
    optimizer = optax.adam(3e-3)
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
    "int8 learned": one(Int8Config(), scales="learned"),
    "ternary": one(TernaryConfig(group=64)),
    "ternary learned": one(TernaryConfig(group=None), scales="learned"),
    "nm_int4": one(NMInt4Config(group=32)),
    "nm_int4 fixed and learned": one(NMInt4Config(group=32), scales="learned", masks="fixed"),
    "vnm_int4 learned": one(VNMInt4Config(v=16, group=32), scales="learned"),
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
    assert all(row.relative_error == 0 for row in ledger.rows)


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
    assert marks["embed"] is True and marks["layers.mlp_norm.gain"] is False
    optimizer = optax.adam(3e-3)
    state, _ = walk(TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, start), optimizer.init(start)), rules)
    for name, array in named_arrays(state.model).items():
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
