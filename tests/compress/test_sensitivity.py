"""Sensitivities: gradients and Gram matrices against plain ones, and forecasts against measured divergences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hsai.compress.allocate import Item
from hsai.compress.plain import NearestConfig, pack_weight
from hsai.compress.sensitivity import INPUTS, LABELS, LEVEL, draw_labels, measure_sensitivities, sum_gradients
from hsai.compress.solvers import FeedbackConfig
from hsai.compress.stream import take_block
from hsai.errors import InputError
from hsai.formats import Int4Config, Int8Config, NMInt4Config, TernaryConfig, nbytes, to_dense
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer, TransformerConfig
from tests.compress.trained import calibration_windows, divergence, trained_model

CONFIG = TransformerConfig(
    vocab=40,
    embed=48,
    layers=3,
    heads=2,
    kv_heads=1,
    head_dim=16,
    mlp=80,
    max_length=200,
    dtype="float32",
    qkv_bias=True,
    scale_embeddings=True,
)
NAMES = [f"layers.{w}" for w in ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.down")]
FORMATS = (Int8Config(), Int4Config(group=32), NMInt4Config(n=2, group=32), TernaryConfig(group=32))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


def make_keys(seed: int, count: int) -> jax.Array:
    """Those of the first sequences."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def draw_tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, CONFIG.vocab, (rows, length)).astype(np.int32)


def square(grad: jax.Array) -> np.ndarray:
    return np.square(np.asarray(grad, np.float64)).reshape(-1, grad.shape[-1]).sum(axis=0)


def test_moments_are_those_of_the_gradients_at_each_product(model: Transformer) -> None:
    """By hand, layer after layer: something is added to what each product gives, and jax differentiates by it."""
    tokens = draw_tokens(4, 20)
    found = sum_gradients(model, NAMES, tokens, batch=4, seed=5)
    positions = jnp.broadcast_to(jnp.arange(20), tokens.shape)
    rotations = model.make_rotations(positions)

    def forward(added: dict[str, jax.Array]) -> jax.Array:
        x = model.embed_tokens(tokens) + added["embed"] * CONFIG.embed**0.5
        for layer in range(3):
            block = take_block(model, layer)
            y, _ = block.attention(block.attention_norm(x), positions, rotations[0], None, None)
            x = x + y + added["layers.attention.o"][layer]
            normed = block.mlp_norm(x)
            gate = normed @ block.mlp.gate[...] + added["layers.mlp.gate"][layer]
            hidden = jax.nn.silu(gate) * (normed @ block.mlp.up[...])
            x = x + hidden @ block.mlp.down[...] + added["layers.mlp.down"][layer]
        return model.final_norm(x)

    widths = {"layers.attention.o": 48, "layers.mlp.gate": 80, "layers.mlp.down": 48}
    zeros = {name: jnp.zeros((3, 4, 20, width)) for name, width in widths.items()} | {"embed": jnp.zeros((4, 20, 48))}
    hidden, back = jax.vjp(forward, zeros)
    d_hidden, *_ = draw_labels(model, hidden, make_keys(5, 4))
    (wanted,) = back(d_hidden)
    for name in widths:
        assert found[name].shape == (3, widths[name])
        for layer in range(3):
            np.testing.assert_allclose(found[name][layer], square(wanted[name][layer]), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found["embed"], square(wanted["embed"]), rtol=1e-3, atol=1e-6)


def test_moments_of_one_token_are_squared_gradients_of_biases(model: Transformer) -> None:
    """A bias is added to the product of q, k and v; of a token by itself its gradient is that of the product."""
    tokens = draw_tokens(1, 1)
    found = sum_gradients(model, NAMES, tokens, batch=1, seed=0)
    names = [f"layers.attention.{w}_bias" for w in "qkv"]

    def forward(biases: dict[str, jax.Array]) -> jax.Array:
        return replace_weights(model, biases)(tokens)[0]

    hidden, back = jax.vjp(forward, {name: named_weights(model)[name].get_value() for name in names})
    (wanted,) = back(draw_labels(model, hidden, make_keys(0, 1))[0])
    np.testing.assert_allclose(found["layers.attention.v"], np.square(wanted[names[2]]), rtol=1e-3, atol=1e-9)
    assert np.asarray(found["layers.attention.v"]).min(axis=1).max() > 0
    assert np.asarray(found["layers.attention.q"]).max() < 1e-12  # who attends to one token has no choice


def test_moments_add_up_over_batches(model: Transformer) -> None:
    """Each sequence draws its labels, however many there are at a time; with another seed, others."""
    tokens = draw_tokens(64, 20)
    one, many, other = (
        sum_gradients(model, NAMES, tokens, batch=batch, seed=seed) for batch, seed in ((64, 0), (16, 0), (64, 1))
    )
    for name in (LABELS, INPUTS, LEVEL):
        np.testing.assert_allclose(many[name], one[name], rtol=1e-4, atol=1e-2)
    for name in NAMES:
        assert np.linalg.norm(many[name] - one[name]) < 1e-3 * np.linalg.norm(one[name])
        assert np.linalg.norm(other[name] - one[name]) > 1e-2 * np.linalg.norm(one[name])


def test_labels_are_drawn_from_the_models_own_predictions(model: Transformer) -> None:
    """Rows longer than a chunk, and a ragged one. The head is as wide as it is long, so its product can be undone."""
    hidden = jax.random.normal(jax.random.key(0), (3, 150, 48))
    p = np.asarray(jax.nn.softmax(model.logits(hidden)), np.float64)
    inverse = np.linalg.pinv(np.asarray(model.head.get_value(), np.float64).T)
    counts, draws = np.zeros_like(p), 40
    for seed in range(draws):
        d_hidden, labels, inputs, level = jax.jit(draw_labels)(model, hidden, make_keys(seed, 3))
        drawn = p - np.asarray(d_hidden, np.float64) @ inverse
        np.testing.assert_allclose(np.sort(drawn, axis=-1)[..., :-1], 0, atol=1e-3)
        np.testing.assert_allclose(drawn.max(axis=-1), 1, atol=1e-3)
        counts += drawn
    spread = np.sqrt(np.sum(p * (1 - p), axis=(0, 1)) / draws)
    assert (np.abs(np.sum(counts / draws - p, axis=(0, 1))) < 4.5 * spread).all()
    np.testing.assert_allclose(labels, np.sum(p * (1 - p), axis=(0, 1)), rtol=1e-4)
    flat = np.asarray(hidden, np.float64).reshape(-1, 48)
    np.testing.assert_allclose(inputs, flat.T @ flat, rtol=1e-4, atol=1e-3)
    flat /= np.sqrt(np.mean(flat**2, axis=1, keepdims=True))
    np.testing.assert_allclose(level, flat.T @ flat, rtol=1e-4, atol=1e-3)


@functools.cache
def measure_all(solver: FeedbackConfig | NearestConfig) -> list[Item]:
    model, names = trained_model(), ("layers.attention.v", "layers.mlp.down")
    candidates = {"embed": (FORMATS, NearestConfig())} | {name: (FORMATS, solver) for name in names}
    return measure_sensitivities(model, candidates, calibration_windows()[:64], batch=16, seed=0)


def test_forecasts_are_near_the_measured_divergence() -> None:
    """One weight of one layer at a time takes each format, and the KL divergence is measured over the same text."""
    model, tokens = trained_model(), jnp.asarray(calibration_windows()[:64])
    forecasts, measured = [], []
    for item in measure_all(NearestConfig()):
        for option in item.options:
            w = named_weights(model)[item.weight].get_value()
            if item.layer is None:
                packed = pack_weight(w, option.format)
                changed = to_dense(packed)
            else:
                packed = pack_weight(w[item.layer], option.format)
                changed = w.at[item.layer].set(to_dense(packed))
            assert option.bytes == nbytes(packed)
            measured.append(float(divergence(model, replace_weights(model, {item.weight: changed}), tokens)))
            forecasts.append(option.loss)
    ratios = np.log(np.array(forecasts) / np.array(measured))
    by_format = ratios.reshape(-1, len(FORMATS))
    print(f"\nforecast / measured, a row a weight, int8, int4, 2:4 and ternary\n{np.round(np.exp(by_format), 2)}")
    ranks = [np.argsort(np.argsort(values)) for values in (forecasts, measured)]
    assert len(ratios) == 4 * (2 * 4 + 1)
    assert np.corrcoef(*ranks)[0, 1] > 0.95
    assert np.abs(np.median(ratios)) < np.log(1.5) and np.quantile(np.abs(ratios), 0.5) < np.log(1.5)
    # Over five orders of magnitude. The forecast is a second derivative; pruning and three levels are no small step.
    assert np.abs(by_format[:, :2]).max() < np.log(2) and np.abs(ratios).max() < np.log(6)


def test_solved_candidates_cost_less_than_rounded_ones() -> None:
    rounded, solved = measure_all(NearestConfig()), measure_all(FeedbackConfig())
    assert [(item.weight, item.layer) for item in rounded] == [(item.weight, item.layer) for item in solved]
    for plain, better in zip(rounded, solved, strict=True):
        for a, b in zip(plain.options, better.options, strict=True):
            assert (a.format, a.bytes) == (b.format, b.bytes)
            assert b.loss == a.loss if plain.layer is None else b.loss < a.loss * 1.05
    sums = [sum(option.loss for item in items for option in item.options[1:]) for items in (rounded, solved)]
    assert sums[1] < 0.8 * sums[0]


def test_activations_that_are_not_finite_stop_it_at_their_layer(model: Transformer) -> None:
    """Every gradient is NaN then, of the layers before as well."""
    broken = replace_weights(model, {"layers.mlp_norm.gain": model.layers.mlp_norm.gain.get_value().at[1].set(1e30)})
    with pytest.raises(InputError, match="layer 1: what mlp"):
        sum_gradients(broken, NAMES, draw_tokens(2, 8), batch=2, seed=0)


def test_gradients_that_are_not_finite_stop_it(model: Transformer) -> None:
    broken = replace_weights(model, {"final_norm.gain": jnp.full((48,), 1e38)})
    with pytest.raises(InputError, match="gradients over calibration are NaN or infinite"):
        sum_gradients(broken, NAMES, draw_tokens(2, 8), batch=2, seed=0)
