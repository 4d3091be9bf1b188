"""Reconstruction: blocks come closer to the dense model on text that nobody tuned on, and what is kept is what fits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.compress import RecipeConfig, Rule, compress
from hsai.compress.calibrated import FeedbackConfig
from hsai.compress.reconstruct import ReconstructionConfig
from hsai.compress.resume import Workbench
from hsai.compress.stream import Streams, apply_block, stream_blocks, take_block
from hsai.errors import InputError
from hsai.formats import Int2Config, Int4Config, NMConfig, NMInt4Config, Packed, TernaryConfig, VNMInt4Config
from hsai.formats.storage import named_weights
from tests.compress.trained import CALIBRATION, calibration_windows, divergence, trained_model, unseen_windows

TUNING = ReconstructionConfig(steps=64)


def make_recipe(format, reconstruction: ReconstructionConfig | None) -> RecipeConfig:
    rule = Rule(pattern="layers.*", format=format, solver=FeedbackConfig())
    return RecipeConfig(rules=(rule,), calibration=CALIBRATION, reconstruction=reconstruction)


def solve(format, reconstruction: ReconstructionConfig | None, workbench: Workbench | None = None):
    recipe = make_recipe(format, reconstruction)
    return compress(trained_model(), recipe, calibration=calibration_windows(), workbench=workbench)


def unseen_divergence(model) -> float:
    return float(jax.jit(divergence)(trained_model(), model, jnp.asarray(unseen_windows()[:128])))


@pytest.mark.parametrize(
    ("format", "share"),
    [
        (Int2Config(group=32), 0.6),
        (NMInt4Config(n=2, m=4, group=32), 0.6),
        (NMConfig(n=1, m=4, dtype="bfloat16"), 0.6),
    ],
    ids=["int2", "2:4 int4", "1:4"],
)
def test_blocks_come_closer_to_the_dense_model(format, share: float) -> None:
    plain, ledger = solve(format, None)
    assert ledger.blocks == () and "blocks" not in ledger.to_dict()
    tuned, ledger = solve(format, TUNING)
    assert [row.layer for row in ledger.blocks] == [0, 1, 2, 3]
    assert all(row.tuned and row.error_tuned < row.error_solved for row in ledger.blocks)
    assert unseen_divergence(tuned) < share * unseen_divergence(plain)
    if hasattr(format, "mask"):  # of the first layer masks are the solver's alone; behind it inputs differ
        for name, param in named_weights(plain).items():
            if isinstance(param.get_value(), Packed):
                kept, found = (p.get_value().kept()[0] for p in (param, named_weights(tuned)[name]))
                np.testing.assert_array_equal(kept, found, err_msg=name)


@pytest.mark.parametrize("format", [Int4Config(group=32), TernaryConfig(group=32), VNMInt4Config(v=32, group=32)])
def test_other_formats_are_tuned_too(format) -> None:
    tuned, ledger = solve(format, dataclasses.replace(TUNING, steps=8))
    assert all(row.error_tuned <= row.error_solved for row in ledger.blocks if row.tuned)
    assert any(row.tuned for row in ledger.blocks)
    assert np.isfinite(unseen_divergence(tuned))


def test_a_block_that_gets_worse_stays_as_it_was() -> None:
    plain, _ = solve(Int4Config(group=32), None)
    wild, ledger = solve(Int4Config(group=32), ReconstructionConfig(steps=4, learning_rate=0.99, scale_rate=0.99))
    assert not any(row.tuned for row in ledger.blocks)
    assert all(row.error_tuned > row.error_solved for row in ledger.blocks)
    for one, other in zip(jax.tree.leaves(wild), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_ledger_tells_what_the_packed_block_gives() -> None:
    """The last row's error is that of the packed model's last layer against the dense one's, on what was held out."""
    tuned, ledger = solve(NMInt4Config(n=2, m=4, group=32), TUNING)
    windows = calibration_windows()
    seen: dict[int, Streams] = {}

    def follow(layer, block, grams, streams):
        seen[layer] = dataclasses.replace(streams, inputs=streams.inputs.copy(), targets=streams.targets.copy())
        return take_block(tuned, layer)

    stream_blocks(trained_model(), windows, batch=CALIBRATION.batch, solve=follow, follow_dense=True)
    for row in ledger.blocks:
        batches = np.arange(len(windows)).reshape(-1, CALIBRATION.batch)
        held = TUNING.count_held(len(batches))
        chosen = batches[np.random.default_rng((CALIBRATION.seed, row.layer)).permutation(len(batches))[:held]].ravel()
        x, target = seen[row.layer].inputs[chosen], seen[row.layer].targets[chosen]
        y = apply_block(tuned, take_block(tuned, row.layer), jnp.int32(row.layer), jnp.asarray(x))
        error = np.square(np.asarray(y) - target).sum(-1) / np.square(target).sum(-1)
        assert np.sqrt(error.mean()) == pytest.approx(row.error_tuned, rel=1e-3)


def test_targets_are_the_dense_models() -> None:
    model, windows = trained_model(), calibration_windows()[:32]
    seen = []

    def spoil(layer, block, grams, streams):
        seen.append(streams.targets.copy())
        return jax.tree.map(lambda w: w * 0.5, block)

    stream_blocks(model, windows, batch=16, solve=spoil, follow_dense=True)
    x = model.embed_tokens(jnp.asarray(windows))
    for layer, target in enumerate(seen):
        x = apply_block(model, take_block(model, layer), jnp.int32(layer), x)
        np.testing.assert_allclose(target, x, rtol=1e-4, atol=1e-4)


def test_a_killed_run_finds_its_tuned_layers(tmp_path) -> None:
    format = Int2Config(group=32)
    config = dataclasses.replace(TUNING, steps=4)
    whole, ledger = solve(format, config, Workbench(tmp_path, {}))
    for name in ("layer_0002", "layer_0003"):
        (tmp_path / f"{name}.json").unlink()
    again, ledger_again = solve(format, config, Workbench(tmp_path, {}))
    assert ledger_again.to_dict() == ledger.to_dict() and len(ledger.blocks) == 4
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"scale_rate": 1.0}, "scale_rate=1.0"),
        ({"held_share": 1.0}, "held_share=1.0"),
    ],
)
def test_what_tunes_nothing_is_refused(change, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ReconstructionConfig(**change)


def test_a_recipe_that_has_nothing_to_tune_is_refused() -> None:
    with pytest.raises(InputError, match="no rule has a solver"):
        RecipeConfig(rules=(Rule(pattern="*", format=Int4Config(group=32)),), reconstruction=TUNING)
    single = dataclasses.replace(CALIBRATION, tokens=CALIBRATION.batch * CALIBRATION.sequence_length)
    with pytest.raises(InputError, match=f"calibration.batch={single.batch}"):
        dataclasses.replace(make_recipe(Int4Config(group=32), TUNING), calibration=single)
