"""Experts: each is solved, scaled and priced by the tokens that are routed to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hsai.compress import RecipeConfig, Rule, compress
from hsai.compress.allocate import AllocationConfig
from hsai.compress.calibration import CalibrationConfig, draw_windows
from hsai.compress.plain import NearestConfig, pack_weight
from hsai.compress.scaling import ScalingConfig
from hsai.compress.sensitivity import draw_labels, measure_sensitivities, sum_gradients
from hsai.compress.solvers import FeedbackConfig
from hsai.compress.stream import stream_blocks, take_block
from hsai.formats import Int4, Int4Config, Int8Config, OutliersConfig, to_dense
from hsai.formats.storage import replace_weights
from hsai.models import MoEConfig, Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab=96,
    embed=64,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=32,
    mlp=32,
    max_length=64,
    moe=MoEConfig(experts=4, active=2),
    dtype="float32",
)
CALIBRATION = CalibrationConfig(tokens=256, sequence_length=32, batch=4)
TOKENS = draw_windows(np.random.default_rng(0).integers(0, 96, 1000), CALIBRATION)
NAMES = ("gate", "up", "down")
FORMAT = Int4Config(group=32)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Whose activations are uneven, so that there is something to make up for."""
    made = Transformer(CONFIG, rngs=nnx.Rngs(0))
    gains = jnp.exp(jax.random.normal(jax.random.key(0), (1, 64)))
    return replace_weights(made, {"layers.mlp_norm.gain": gains})


def read_first_layer(model: Transformer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the experts of the first layer read, (N, D), to whom it goes, (N, A), and with what weight."""
    block = take_block(model, 0)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    x = model.embed_tokens(jnp.asarray(TOKENS))
    y, _ = block.attention(block.attention_norm(x), positions, model.make_rotations(positions)[0], None, None)
    normed = block.mlp_norm(x + y)
    return tuple(np.asarray(part).reshape(TOKENS.size, -1) for part in (normed, *block.mlp.route(normed)))


def level(normed: np.ndarray) -> np.ndarray:
    """(N, D) as Gram matrices count them."""
    return normed / np.sqrt(np.mean(np.square(normed, dtype=np.float64), axis=-1, keepdims=True))


def test_each_expert_is_observed_on_its_own_tokens(model: Transformer) -> None:
    seen = {}

    def keep(layer, block, grams, streams):
        seen[layer] = streams.raw, streams.counts
        return block

    stream_blocks(model, TOKENS, batch=4, solve=keep, raw=True)
    grams, counts = seen[0]
    normed, chosen, _ = read_first_layer(model)
    mlp = take_block(model, 0).mlp
    np.testing.assert_allclose(grams["mlp.router"], normed.T @ normed, rtol=1e-3, atol=1e-2)
    for expert in range(4):
        rows = normed[(chosen == expert).any(axis=1)]
        assert len(rows) and counts["mlp.gate"][expert] == len(rows)
        for name in ("gate", "up"):
            np.testing.assert_allclose(grams[f"mlp.{name}"][expert], rows.T @ rows, rtol=1e-3, atol=1e-2)
        hidden = np.asarray(jax.nn.silu(rows @ mlp.gate[expert]) * (rows @ mlp.up[expert]))
        np.testing.assert_allclose(grams["mlp.down"][expert], hidden.T @ hidden, rtol=1e-3, atol=1e-3)
    assert counts["mlp.down"].sum() == 2 * TOKENS.size and counts["attention.q"] == TOKENS.size


def test_solved_experts_miss_less_of_their_outputs(model: Transformer) -> None:
    """With outliers, of which each expert has its own."""
    format = OutliersConfig(base=FORMAT, share=0.03)
    rules = (Rule(pattern="layers.mlp.up", format=format, solver=FeedbackConfig()),)
    solved, ledger = compress(model, RecipeConfig(rules=rules, calibration=CALIBRATION), calibration=TOKENS)
    normed, chosen, _ = read_first_layer(model)
    held, dense = to_dense(solved.layers.mlp.up.get_value())[0], model.layers.mlp.up.get_value()[0]
    plain = to_dense(pack_weight(dense, format))
    assert len({tuple(found) for found in solved.layers.mlp.up.get_value().index[0, :, :, 0].tolist()}) > 1
    errors, missed, whole = [], 0.0, 0.0
    for expert in range(4):
        rows = level(normed)[(chosen == expert).any(axis=1)]
        wanted = rows @ dense[expert]
        missed += np.linalg.norm(rows @ held[expert] - wanted) ** 2
        whole += np.linalg.norm(wanted) ** 2
        errors.append(np.linalg.norm(rows @ held[expert] - wanted) / np.linalg.norm(rows @ plain[expert] - wanted))
    assert max(errors) < 0.9, errors
    (row,) = ledger.layers
    assert row.output_error == pytest.approx((missed / whole) ** 0.5, rel=1e-2)
    assert (row.weight, row.layer, row.damping, row.note) == ("layers.mlp.up", 0, 0.01, "")


def test_an_expert_without_tokens_is_rounded_and_reported(model: Transformer) -> None:
    """Its rate lies between those of two others, always."""
    config = dataclasses.replace(CONFIG, moe=MoEConfig(experts=4, active=1))
    idle = Transformer(config, rngs=nnx.Rngs(0))
    router = idle.layers.mlp.router.get_value()
    idle = replace_weights(idle, {"layers.mlp.router": router.at[:, :, 2].set((router[:, :, 0] + router[:, :, 1]) / 2)})
    rules = (Rule(pattern="layers.mlp.up", format=FORMAT, solver=FeedbackConfig()),)
    solved, ledger = compress(idle, RecipeConfig(rules=rules, calibration=CALIBRATION), calibration=TOKENS)
    (row,) = ledger.layers
    assert row.note == "no token went to expert 2" and row.damping == 0.01
    found, w = solved.layers.mlp.up.get_value(), idle.layers.mlp.up.get_value()
    assert isinstance(found, Int4) and found.shape == w.shape
    plain = pack_weight(w, FORMAT)
    np.testing.assert_array_equal(found.words[0, 2], plain.words[0, 2])
    assert (found.words[0, 0] != plain.words[0, 0]).any()


def test_experts_are_scaled_by_their_own_tokens(model: Transformer) -> None:
    # So uneven that there is much to scale: where tokens count the same, the loud channels of a few decide no longer.
    gains = model.layers.mlp_norm.gain.get_value() ** 3
    uneven = replace_weights(model, {"layers.mlp_norm.gain": gains})
    rules = (Rule(pattern="layers.mlp.[gud]*", format=FORMAT),)
    recipe = RecipeConfig(rules=rules, transforms=(ScalingConfig(steps=4),), calibration=CALIBRATION)
    scaled, ledger = compress(uneven, recipe, calibration=TOKENS)
    assert [row.source for row in ledger.scales] == ["layers.mlp_norm", "layers.mlp.up"]
    assert ledger.scales[0].error_after < 0.9 * ledger.scales[0].error_before
    tokens = jnp.asarray(TOKENS)
    dense = uneven(tokens)[0]
    plain, _ = compress(uneven, RecipeConfig(rules=rules))
    errors = [float(jnp.linalg.norm(each(tokens)[0] - dense)) for each in (plain, scaled)]
    assert errors[1] < errors[0], errors


def test_moments_of_experts_are_those_of_their_tokens() -> None:
    """By hand: something is added to what each expert's product gives each token, and jax differentiates by it."""
    one = Transformer(CONFIG, rngs=nnx.Rngs(0))
    tokens = TOKENS[:4]
    found = sum_gradients(one, [f"layers.mlp.{name}" for name in NAMES], tokens, batch=4, seed=3)
    block = take_block(one, 0)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = one.embed_tokens(jnp.asarray(tokens))
    y, _ = block.attention(block.attention_norm(x), positions, one.make_rotations(positions)[0], None, None)
    normed = block.mlp_norm(x + y)
    chosen, weights = block.mlp.route(normed)
    shares = jnp.sum(jax.nn.one_hot(chosen, 4) * weights[..., None], axis=-2)

    def forward(added: dict[str, jax.Array]) -> jax.Array:
        def multiply(name: str, rows: jax.Array) -> jax.Array:
            return jnp.einsum("btd,edf->ebtf" if rows.ndim == 3 else "ebtd,edf->ebtf", rows, w[name]) + added[name]

        w = {name: getattr(block.mlp, name)[...] for name in NAMES}
        out = multiply("down", jax.nn.silu(multiply("gate", normed)) * multiply("up", normed))
        return one.final_norm(x + y + jnp.einsum("ebtd,bte->btd", out, shares))

    zeros = {name: jnp.zeros((4, *tokens.shape, 64 if name == "down" else 32)) for name in NAMES}
    hidden, back = jax.vjp(forward, zeros)
    (wanted,) = back(
        draw_labels(one, hidden, jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(4)))[0]
    )
    for name in NAMES:
        squares = np.square(np.asarray(wanted[name], np.float64)).sum(axis=(1, 2))
        assert squares.min() > 0
        np.testing.assert_allclose(found[f"layers.mlp.{name}"][0], squares, rtol=2e-3, atol=1e-7)


def test_a_budget_is_spent_on_experts_too(model: Transformer) -> None:
    """A price is the sum of what its experts cost, each by its share of the tokens."""
    candidates = (Int8Config(), FORMAT)
    name = "layers.mlp.up"
    items = measure_sensitivities(model, {name: (candidates, NearestConfig())}, TOKENS, batch=4, seed=0)
    moments = np.asarray(sum_gradients(model, [name], TOKENS, batch=4, seed=0)[name][0], np.float64)
    normed, chosen, _ = read_first_layer(model)
    w = model.layers.mlp.up.get_value()[0]
    for option in items[0].options:
        missed, wanted = np.asarray(w - to_dense(pack_weight(w, option.format)), np.float64), 0.0
        for expert in range(4):
            rows = normed[(chosen == expert).any(axis=1)]
            wanted += np.sum(moments[expert] * ((rows @ missed[expert]) ** 2).mean(axis=0)) / 2 / TOKENS.size
        assert option.loss == pytest.approx(wanted, rel=1e-2)
    rules = (Rule(pattern="layers.mlp.*", format=candidates), Rule(pattern="*", format=Int8Config()))
    recipe = RecipeConfig(
        rules=rules, calibration=CALIBRATION, allocation=AllocationConfig(bits_per_weight=7.5, windows=4)
    )
    packed, ledger = compress(model, recipe, calibration=TOKENS)
    assert ledger.bytes <= ledger.allocation.budget
    assert {option.format for option in ledger.allocation.options} == set(candidates)
    assert bool(jnp.all(jnp.isfinite(packed(jnp.asarray(TOKENS[:1]))[0])))
