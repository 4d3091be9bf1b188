"""Training as if packed: what the forward pass sees, what the gradient is, and that the end packs without loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hsai.compress.grid import grid_of
from hsai.compress.held import find_mask, find_scale, hold
from hsai.compress.latent import Latent, to_exponent, to_scale
from hsai.compress.plain import pack_weight
from hsai.formats import (
    DenseConfig,
    FormatConfig,
    Int4Config,
    Int4Offset,
    Int4OffsetConfig,
    Int8Config,
    NMConfig,
    NMInt4Config,
    NMInt8Config,
    TernaryConfig,
    UnstructuredConfig,
    UnstructuredInt4Config,
    VNMConfig,
    VNMInt4Config,
    VNMInt8Config,
    to_dense,
)
from hsai.formats.storage import named_arrays, named_weights, replace_weights
from hsai.models import Transformer, TransformerConfig
from hsai.train.formats import begin, match_formats, see_packed
from tests.train.batches import MODEL, SMALL
from tests.train.rules import SPARSE24, in_blocks, keep_largest, one

FORMATS: list[FormatConfig] = [
    DenseConfig(),
    Int8Config(),
    Int4Config(group=32),
    Int4Config(group=64),
    Int4OffsetConfig(group=32),
    TernaryConfig(group=32),
    TernaryConfig(group=None),
    NMConfig(n=1, dtype="float32"),
    NMConfig(n=2),
    NMConfig(n=4, m=8),
    NMInt4Config(n=2, m=4, group=32),
    NMInt4Config(n=2, m=8, group=64),
    VNMConfig(v=16),
    VNMInt4Config(v=16, group=32),
    VNMInt8Config(v=16),
    UnstructuredConfig(density=0.25),
    UnstructuredInt4Config(group=32),
]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return jax.jit(lambda: Transformer(MODEL, rngs=nnx.Rngs(0)))()


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
    if isinstance(packed, Int4Offset):
        np.testing.assert_array_equal(scale, jnp.concatenate([packed.scale, packed.minimum], axis=-1))
    elif scale is not None:
        np.testing.assert_array_equal(scale, packed.scale)
    kept = None if isinstance(packed, jax.Array) else packed.kept()
    assert (kept is None) == (mask is None)
    if mask is not None:
        np.testing.assert_array_equal(kept, mask)


@pytest.mark.parametrize("format", [Int8Config(), TernaryConfig(group=64), NMInt8Config()], ids=str)
def test_scales_that_are_not_searched_are_those_of_the_format(format: FormatConfig) -> None:
    """Which finds them by itself."""
    w = draw_weight("outliers")[0]
    jax.tree.map(np.testing.assert_array_equal, pack_weight(w, format), format.pack(w))


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
    """LSQ (1902.08153, eqs. 1 to 5; minima: 2004.09576) for jax to differentiate: what is rounded is a constant beside
    what was."""
    grid = grid_of(format)
    assert grid is not None
    layers, size, outputs = latent.shape
    groups = latent.values.reshape(layers, -1, grid.group or size, outputs)
    # The gradient of a scale is divided by sqrt(number of its weights * highest level); its rounding has none.
    share = 1 / np.sqrt(groups.shape[-2] * grid.high)

    def store(exact: jax.Array) -> jax.Array:
        stored = jax.lax.stop_gradient(exact.astype(grid.dtype).astype(jnp.float32))
        return (stored + share * (exact - jax.lax.stop_gradient(exact)))[..., None, :]

    scale = store(latent.scale)
    start = store(jnp.zeros((1,)) if latent.minimum is None else latent.minimum)
    level = (groups - start) / scale
    inside = (level >= grid.low) & (level <= grid.high)
    rounded = level + jax.lax.stop_gradient(jnp.round(level) - level)
    held = jnp.where(inside, rounded, jnp.clip(jax.lax.stop_gradient(level), grid.low, grid.high))
    seen = (held * scale + start).reshape(latent.shape)
    return seen if mask is None else jnp.where(mask, seen, 0.0)


@pytest.mark.parametrize(
    "format",
    [
        Int4Config(group=32),
        Int4OffsetConfig(group=32),
        TernaryConfig(group=None),
        NMInt4Config(n=2, m=4, group=32),
        VNMInt4Config(v=16, group=32),
    ],
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
        assert (found.minimum is None) == (not isinstance(format, Int4OffsetConfig))
        if found.minimum is not None:
            np.testing.assert_allclose(found.minimum, wanted.minimum, rtol=1e-4, atol=1e-6, err_msg=name)
            assert np.abs(found.minimum).max() > 0.01
        assert (latent.sign is None) == isinstance(format, Int4OffsetConfig | TernaryConfig)
        if latent.sign is not None:
            assert set(np.unique(latent.sign)) == {-1, 1} and not found.sign.any()
        assert 0.02 < np.mean(np.asarray(found.values) == 0) < 0.9  # something was clipped, and not everything


def test_a_scale_is_its_exponent_and_back() -> None:
    draw = np.random.default_rng(0)
    scale = jnp.asarray(np.exp(draw.uniform(-60, 20, 10_000)), jnp.bfloat16)
    assert jnp.array_equal(to_scale(to_exponent(scale)).astype(jnp.bfloat16), scale)
    assert jnp.array_equal(to_scale(jnp.asarray([-3.0, 0.0, 0.5, 2.25])), jnp.asarray([0.125, 1.0, 1.5, 5.0]))
    steps = to_scale(jnp.linspace(-9, 3, 5001))
    assert jnp.all(jnp.diff(steps) > 0) and float(jnp.max(steps[1:] / steps[:-1])) < 1.003
    assert jnp.isfinite(to_exponent(jnp.zeros(3))).all()
