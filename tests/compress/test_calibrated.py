"""Calibration sees what the blocks see, and weights solved over it disturb the model less than rounded ones."""

import dataclasses
import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hsai.compress import RecipeConfig, Rule, calibrated, compress, solved, stream
from hsai.compress.block_solver import BlockSolver
from hsai.compress.calibrated import check_observed
from hsai.compress.calibration import CalibrationConfig, digest_windows, draw_windows
from hsai.compress.plain import NearestConfig, pack_weight
from hsai.compress.plan import plan_recipe
from hsai.compress.solvers import FeedbackConfig
from hsai.compress.stream import Grams, Streams, apply_block, stream_blocks, take_block
from hsai.errors import InputError
from hsai.formats import (
    DenseConfig,
    Int2Config,
    Int3Config,
    Int4,
    Int4Config,
    Int8Config,
    NMConfig,
    NMInt4Config,
    NMInt8Config,
    OutliersConfig,
    VNMInt4Config,
    to_dense,
)
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import Block

CONFIG = TransformerConfig(
    vocab=96, embed=64, layers=3, heads=2, kv_heads=1, head_dim=32, mlp=128, max_length=64, dtype="float32"
)
CALIBRATION = CalibrationConfig(tokens=512, sequence_length=32, batch=4)
TOKENS = draw_windows(np.random.default_rng(0).integers(0, 96, 1000), CALIBRATION)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


def test_blocks_are_observed_on_what_reaches_them(model: Transformer) -> None:
    """The grams of the last layer are those of a plain pass, and each product has the input it should."""
    seen = {}

    def keep(layer, block, grams, streams):
        seen[layer] = streams.raw
        return block

    stream_blocks(model, TOKENS, batch=4, solve=keep, raw=True)
    positions = jnp.broadcast_to(jnp.arange(32), TOKENS.shape)
    x = model.embed_tokens(jnp.asarray(TOKENS))
    for layer in range(2):
        x, *_ = model.apply_block(take_block(model, layer), layer, x, positions, model.make_rotations(positions))
    normed = take_block(model, 2).attention_norm(x).reshape(-1, 64)
    assert set(seen[2]) == {f"attention.{n}" for n in "qkvo"} | {f"mlp.{n}" for n in ("gate", "up", "down")}
    for name in ("attention.q", "attention.k", "attention.v"):
        np.testing.assert_allclose(seen[2][name], normed.T @ normed, rtol=2e-4, atol=2e-3)
    assert seen[2]["mlp.down"].shape == (128, 128)
    assert not np.allclose(seen[2]["mlp.gate"], seen[2]["attention.q"], rtol=0.01)


def test_memory_holds_one_block_and_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the model: one set of matrices while a block is observed and solved, and none behind it, however many
    layers and windows there are; arrays that are alive whenever a batch is laid out, and as a block is solved."""
    model = Transformer(dataclasses.replace(CONFIG, layers=5), rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 96, (16, 32)).astype(np.int32)
    real = stream.lay_out

    def count() -> int:
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays()) - before

    def lay_out(*arguments):
        at_batches.append(count())
        return real(*arguments)

    def keep(layer, block, grams, streams):
        at_blocks.append(count())
        sizes["grams"] = sum({id(gram): gram.nbytes for gram in grams.values()}.values())
        sizes["block"] = sum(leaf.nbytes for leaf in jax.tree.leaves(block))
        return block

    sizes: dict[str, int] = {}
    monkeypatch.setattr(stream, "lay_out", lay_out)
    found = []
    for windows in (4, 16):
        at_batches: list[int] = []
        at_blocks: list[int] = []
        before = 0
        before = count()
        stream_blocks(model, tokens[:windows], batch=2, solve=keep)
        found.append((max(at_batches), max(at_blocks)))
        assert len(at_batches) == windows // 2 * (1 + 5 + 4) and len(set(at_blocks[1:])) == 1
    assert found[0] == found[1]
    batch = 2 * 32 * 64 * 4
    for most in found[0]:
        assert most < sizes["block"] + sizes["grams"] + 3 * batch, (most, sizes)
    assert sizes["grams"] > 3 * batch, "a second set of matrices would not be seen"


def test_a_block_follows_what_became_of_the_one_before(model: Transformer) -> None:
    seen = {}

    def silence(layer, block, grams, streams):
        seen[layer] = streams.raw
        zero = {
            n: jnp.zeros_like(p.get_value()) for n, p in named_weights(block).items() if n.endswith((".o", ".down"))
        }
        return replace_weights(block, zero)

    stream_blocks(model, TOKENS, batch=4, solve=silence, raw=True)
    x = model.embed_tokens(jnp.asarray(TOKENS))
    for layer in range(3):  # nothing was added to the embedding
        normed = take_block(model, layer).attention_norm(x).reshape(-1, 64)
        np.testing.assert_allclose(seen[layer]["attention.q"], normed.T @ normed, rtol=2e-4, atol=2e-3)


def test_the_first_block_reads_the_embedding_as_it_is_packed(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not what it comes close to; one that is solved as the head, after all layers, it reads as it was."""
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def keep(layer: int, block: Block, grams: Grams, streams: Streams) -> Block:
        if layer == 0:
            assert streams.targets is not None
            seen["dense"] = (streams.inputs.copy(), streams.targets.copy())
        return block

    coarse = {"embed": Int2Config(group=32).pack(model.embed.get_value())}
    packed = replace_weights(model, coarse)
    stream_blocks(model, TOKENS, batch=4, solve=keep, packed=packed, follow_dense=True)
    inputs, targets = seen["dense"]
    np.testing.assert_array_equal(inputs, packed.embed_tokens(jnp.asarray(TOKENS)))
    block = take_block(model, 0)
    wanted = apply_block(model, block, jnp.int32(0), model.embed_tokens(jnp.asarray(TOKENS)))
    np.testing.assert_allclose(targets, wanted, rtol=1e-5, atol=1e-5)

    real, given = calibrated.stream_blocks, []

    def listen(*arguments: Any, **words: Any) -> None:
        given.append(words["packed"])
        real(*arguments, **words)

    monkeypatch.setattr(calibrated, "stream_blocks", listen)
    layers = Rule(pattern="layers.mlp.*", format=Int4Config(group=32), solver=FeedbackConfig())
    for solver in (NearestConfig(), FeedbackConfig()):
        table = Rule(pattern="embed", format=Int2Config(group=32), solver=solver)
        recipe = RecipeConfig(rules=(layers, table), calibration=CALIBRATION)
        found, _ = compress(model, recipe, calibration=TOKENS)
        if given[-1] is not None:
            np.testing.assert_array_equal(given[-1].embed.get_value(), to_dense(found.embed.get_value()))
    assert [model is None for model in given] == [False, True]


def test_an_embedding_that_is_packed_already_stays_beside_solved_layers(model: Transformer) -> None:
    """It is in the format of its rule, whatever solver that names; what the layers read is what it holds."""
    table = Int8Config().pack(model.embed.get_value())
    half = replace_weights(model, {"embed": table})
    rules = (
        Rule(pattern="layers.mlp.*", format=Int4Config(group=32), solver=FeedbackConfig()),
        Rule(pattern="embed", format=Int8Config(), solver=FeedbackConfig()),
    )
    found, _ = compress(half, RecipeConfig(rules=rules, calibration=CALIBRATION), calibration=TOKENS)
    for one, other in zip(jax.tree.leaves(found.embed.get_value()), jax.tree.leaves(table), strict=True):
        np.testing.assert_array_equal(one, other)
    assert isinstance(found.layers.mlp.up.get_value(), Int4)


def test_a_block_hands_on_what_is_rounded_in_it_by_itself(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = (
        Rule(pattern="layers.attention.*", format=Int2Config(group=32)),
        Rule(pattern="layers.mlp.*", format=Int4Config(group=32), solver=FeedbackConfig()),
    )
    real, handed = calibrated.stream_blocks, []

    def listen(*arguments: Any, solve: Any, **words: Any) -> None:
        def keep(*given: Any) -> Block:
            handed.append(solve(*given))
            return handed[-1]

        real(*arguments, solve=keep, **words)

    monkeypatch.setattr(calibrated, "stream_blocks", listen)
    found, ledger = compress(model, RecipeConfig(rules=rules, calibration=CALIBRATION), calibration=TOKENS)
    plain, _ = compress(model, RecipeConfig(rules=rules[:1]))
    for name in "qkvo":
        alone, mixed = (getattr(m.layers.attention, name).get_value() for m in (plain, found))
        for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(mixed), strict=True):
            np.testing.assert_array_equal(one, other)
        for layer, block in enumerate(handed):
            np.testing.assert_array_equal(getattr(block.attention, name).get_value(), to_dense(mixed)[layer])
    rows = {row.weight: row for row in ledger.layers if row.layer == 1}
    assert len(ledger.layers) == 3 * 7 and rows["layers.attention.q"].damping is None
    assert rows["layers.attention.q"].output_error > 3 * rows["layers.mlp.up"].output_error > 0


def test_raised_damping_is_told(model: Transformer) -> None:
    """A matrix that has no factor with the damping that was asked for (tests/compress/test_factor.py)."""
    gram = np.eye(64, dtype=np.float32)
    gram[0, 1] = gram[1, 0] = 1.05
    w = model.layers.mlp.up.get_value()[0]
    solver = BlockSolver({"up": jnp.asarray(gram)}, {})
    packing = solver.pack("up", w, Int4Config(group=32), FeedbackConfig(damping=0.001))
    assert packing.damping == pytest.approx(0.1)
    assert packing.note == "damping was raised to 0.1: there is no factor with 0.001"
    assert solver.pack("up", w, Int4Config(group=32), FeedbackConfig(damping=0.1)).note == ""


@pytest.mark.parametrize(
    "format",
    [
        Int4Config(group=32),
        Int3Config(group=32),
        Int2Config(group=32),
        NMInt8Config(n=2, m=4),
        NMInt4Config(n=2, m=4, group=32),
        VNMInt4Config(v=16, n=2, m=8, group=32),
        NMConfig(n=1),
        OutliersConfig(base=Int3Config(group=32), share=0.02),
    ],
    ids=lambda format: format.format,
)
def test_solved_layers_miss_less_of_their_outputs(model: Transformer, format) -> None:
    blocks = RecipeConfig(rules=(Rule(pattern="layers.*", format=format),))
    solver = FeedbackConfig()
    recipe = RecipeConfig(
        rules=(Rule(pattern="layers.*", format=format, solver=solver), Rule(pattern="embed", format=Int8Config())),
        calibration=CALIBRATION,
    )
    tokens = jnp.asarray(TOKENS)
    want = model(tokens)[0]
    plain, _ = compress(model, blocks)
    found, ledger = compress(model, recipe, calibration=TOKENS)
    errors = [
        float(jnp.linalg.norm(m(tokens)[0] - want))
        for m in (plain, replace_weights(found, {"embed": model.embed.get_value()}))
    ]
    # Where three of four weights go there is less to gain: the model is hardly itself any more.
    assert errors[1] < (0.99 if isinstance(format, VNMInt4Config | NMConfig) else 0.9) * errors[0], errors
    assert type(found.layers.mlp.up.get_value()).__name__ == type(plain.layers.mlp.up.get_value()).__name__
    assert len(ledger.layers) == 3 * 7 and all(row.damping == 0.01 and not row.note for row in ledger.layers)
    assert {row.layer for row in ledger.layers} == {0, 1, 2}
    assert all(0 < row.output_error < 1 for row in ledger.layers)


def test_masks_of_wanda_and_magnitude_are_theirs(model: Transformer) -> None:
    def masks(mask: str) -> np.ndarray:
        rule = Rule(pattern="layers.mlp.down", format=NMConfig(n=2), solver=FeedbackConfig(mask=mask))
        found, _ = compress(model, RecipeConfig(rules=(rule,), calibration=CALIBRATION), calibration=TOKENS)
        return np.asarray(found.layers.mlp.down.get_value().dense()) != 0

    w = model.layers.mlp.down.get_value()
    np.testing.assert_array_equal(masks("magnitude"), NMConfig(n=2).mask(w))
    grams = []
    stream_blocks(model, TOKENS, batch=4, raw=True, solve=lambda n, block, g, s: (grams.append(s.raw), block)[1])
    first = NMConfig(n=2).mask(w[0] * jnp.sqrt(jnp.diagonal(grams[0]["mlp.down"]))[:, None])
    np.testing.assert_array_equal(masks("wanda")[0], first)
    assert (masks("joint") != masks("magnitude")).any()


def test_the_order_of_activations_is_asked_for_by_the_recipe(model: Transformer) -> None:
    """Of channels that are not alike; q and k share a factor in each of two orders."""
    gains = jnp.exp(2.0 * jax.random.normal(jax.random.key(0), (3, 64)))
    uneven = replace_weights(model, {"layers.attention_norm.gain": gains})
    errors = {}
    for order in ("natural", "activations"):
        format, solver = Int4Config(group=32), FeedbackConfig(order=order)
        rules = (Rule(pattern="layers.attention.[qk]", format=format, solver=solver),)
        _, ledger = compress(uneven, RecipeConfig(rules=rules, calibration=CALIBRATION), calibration=TOKENS)
        errors[order] = [row.output_error for row in ledger.layers]
    assert np.mean(np.divide(errors["activations"], errors["natural"])) < 0.95, errors


def test_a_layer_that_fails_is_rounded_and_reported(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = solved.factorize, []

    def fail_once(gram, damping):
        calls.append(gram.shape)
        if len(calls) == 5:
            raise FloatingPointError("no factor")
        return real(gram, damping)

    monkeypatch.setattr(solved, "factorize", fail_once)
    recipe = RecipeConfig(
        rules=(Rule(pattern="layers.mlp.*", format=Int4Config(group=32), solver=FeedbackConfig()),),
        calibration=CALIBRATION,
    )
    found, ledger = compress(model, recipe, calibration=TOKENS)
    failed = [row for row in ledger.layers if row.note]
    assert failed and all(row.note == "rounded plainly: no factor" and row.damping is None for row in failed)
    assert len(ledger.layers) == 9 and isinstance(found.layers.mlp.up.get_value(), Int4)


def test_activations_that_are_not_finite_name_their_layer(model: Transformer) -> None:
    gains = model.layers.mlp_norm.gain.get_value().at[1].set(1e30)
    broken = replace_weights(model, {"layers.mlp_norm.gain": gains})
    recipe = RecipeConfig(
        rules=(Rule(pattern="layers.mlp.*", format=Int4Config(group=32), solver=FeedbackConfig()),),
        calibration=CALIBRATION,
    )
    with pytest.raises(InputError, match="layer 1: what mlp"):
        compress(broken, recipe, calibration=TOKENS)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_solved_over_what_reaches_it(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of its columns too; and what a piece gives is what the whole gives."""
    model = Transformer(dataclasses.replace(CONFIG, tie_embeddings=tied), rngs=nnx.Rngs(1))
    name, format = "embed" if tied else "unembed", Int4Config(group=32)
    errors, found = [], []
    for columns, solver in ((16384, NearestConfig()), (16384, FeedbackConfig()), (40, FeedbackConfig())):
        monkeypatch.setattr(solved, "COLUMNS", columns)
        rules = (Rule(pattern=name, format=format, solver=solver),)
        calibration = CALIBRATION if isinstance(solver, FeedbackConfig) else None
        packed, ledger = compress(model, RecipeConfig(rules=rules, calibration=calibration), calibration=TOKENS)
        found.append(named_weights(packed)[name].get_value())
        hidden = model(jnp.asarray(TOKENS))[0].reshape(-1, 64)
        errors.append(float(jnp.linalg.norm(hidden @ (found[-1].dense() - named_weights(model)[name].get_value()))))
    (row,) = ledger.layers
    assert (row.weight, row.layer, row.damping) == (name, None, 0.01) and 0 < row.output_error < 1
    assert errors[1] < 0.9 * errors[0], errors
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(found[2]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_table_that_is_looked_up_is_rounded_where_a_rule_solves_the_others() -> None:
    model = Transformer(dataclasses.replace(CONFIG, tie_embeddings=False), rngs=nnx.Rngs(1))
    recipe = RecipeConfig(
        rules=(Rule(pattern="*", format=Int4Config(group=32), solver=FeedbackConfig()),), calibration=CALIBRATION
    )
    assert {name: rule.solver.kind for name, rule in plan_recipe(recipe, model).rules.items() if "embed" in name} == {
        "embed": "nearest",
        "unembed": "feedback",
    }
    packed, ledger = compress(model, recipe, calibration=TOKENS)
    plain = pack_weight(model.embed.get_value(), Int4Config(group=32))
    for one, other in zip(jax.tree.leaves(packed.embed.get_value()), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(one, other)
    assert {row.weight for row in ledger.layers} == {
        name for name in plan_recipe(recipe, model).rules if name != "embed"
    }


def test_weights_that_no_product_reads_cannot_be_solved() -> None:
    check_observed(["layers.mlp.up"], {"mlp.up": jnp.eye(4)})
    with pytest.raises(InputError, match="layers.mlp.up cannot be calibrated: no product reads it"):
        check_observed(["layers.mlp.up"], {})


def test_what_cannot_be_calibrated_is_refused_before_work(model: Transformer) -> None:
    rule = Rule(pattern="*", format=Int4Config(group=32), solver=FeedbackConfig())
    untied = Transformer(dataclasses.replace(CONFIG, tie_embeddings=False), rngs=nnx.Rngs(0))
    table = Rule(pattern="embed", format=Int4Config(group=32), solver=FeedbackConfig())
    with pytest.raises(InputError, match="embed: a solver over activations is for what is multiplied by"):
        compress(untied, RecipeConfig(rules=(table, rule), calibration=CALIBRATION), calibration=TOKENS)
    with pytest.raises(InputError, match="needs a calibration"):
        RecipeConfig(rules=(rule,))
    with pytest.raises(InputError, match="no rule has a solver that reads it"):
        RecipeConfig(rules=(Rule(pattern="*", format=Int8Config()),), calibration=CALIBRATION)
    with pytest.raises(InputError, match="dense format has nothing to solve"):
        Rule(pattern="*", format=DenseConfig(), solver=FeedbackConfig())
    with pytest.raises(InputError, match="int4 prunes nothing"):
        Rule(pattern="*", format=Int4Config(), solver=FeedbackConfig(mask="wanda"))
    with pytest.raises(InputError, match="damping=0"):
        FeedbackConfig(damping=0)


def test_windows_are_drawn_once_and_a_short_text_is_refused() -> None:
    stream = np.arange(4000)
    config = CalibrationConfig(tokens=1024, sequence_length=64, batch=2, seed=3)
    windows = draw_windows(stream, config)
    assert windows.shape == (16, 64) and windows.dtype == np.int32
    assert len(np.unique(windows)) == 1024 and (windows[:, 0] % 64 == 0).all()
    np.testing.assert_array_equal(windows, draw_windows(stream, config))
    other = draw_windows(stream, CalibrationConfig(tokens=1024, sequence_length=64, batch=2, seed=4))
    assert digest_windows(windows) != digest_windows(other)
    with pytest.raises(InputError, match="calibration.tokens=1024 exceeds the text, which has 1000 tokens"):
        draw_windows(stream[:1000], config)
    for wrong in ({"tokens": 0}, {"tokens": 100}, {"batch": 3}):
        with pytest.raises(InputError, match="calibration"):
            CalibrationConfig(**({"tokens": 1024, "sequence_length": 64, "batch": 2} | wrong))
