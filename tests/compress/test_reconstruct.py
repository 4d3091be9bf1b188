"""Reconstruction: blocks come closer to the dense model on text that nobody tuned on, and what is kept is what fits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.compress import RecipeConfig, Rule, compress
from hsai.compress.calibrated import FeedbackConfig
from hsai.compress.recipe import match_weights
from hsai.compress.reconstruct import ReconstructionConfig, Reconstructor
from hsai.compress.resume import Workbench
from hsai.compress.stream import Streams, apply_block, stream_blocks, take_block
from hsai.errors import InputError
from hsai.formats import (
    Int2Config,
    Int4Config,
    Int4OffsetConfig,
    NMConfig,
    NMInt4Config,
    OutliersConfig,
    Packed,
    TernaryConfig,
    UnstructuredInt4Config,
    VNMInt4Config,
)
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


def measure_blocks(packed) -> list[float]:
    """Of each packed layer's output against the dense one's, on what was held out: what rows of a ledger tell."""
    windows = calibration_windows()
    seen: dict[int, Streams] = {}

    def follow(layer, block, grams, streams):
        seen[layer] = dataclasses.replace(streams, inputs=streams.inputs.copy(), targets=streams.targets.copy())
        return take_block(packed, layer)

    stream_blocks(trained_model(), windows, batch=CALIBRATION.batch, solve=follow, follow_dense=True)
    batches = np.arange(len(windows)).reshape(-1, CALIBRATION.batch)
    held = TUNING.count_held(len(batches))
    errors = []
    for layer, streams in seen.items():
        chosen = batches[np.random.default_rng((CALIBRATION.seed, layer)).permutation(len(batches))[:held]].ravel()
        x, target = streams.inputs[chosen], streams.targets[chosen]
        y = apply_block(packed, take_block(packed, layer), jnp.int32(layer), jnp.asarray(x))
        error = np.square(np.asarray(y) - target).sum(-1) / np.square(target).sum(-1)
        errors.append(float(np.sqrt(error.mean())))
    return errors


@pytest.mark.parametrize(
    ("format", "share"),
    [
        (Int2Config(group=32), 0.65),  # 0.58 to 0.60, by how the model's training was rounded
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


@pytest.mark.parametrize(
    "format",
    [
        Int4Config(group=32),
        Int4OffsetConfig(group=32),
        TernaryConfig(group=32),
        VNMInt4Config(v=32, group=32),
        UnstructuredInt4Config(block=32, group=32),
    ],
    ids=lambda format: format.format,
)
def test_other_formats_are_tuned_too(format) -> None:
    """Blocks get better, and what is packed in the end has the error that is told."""
    tuned, ledger = solve(format, dataclasses.replace(TUNING, steps=8))
    assert any(row.tuned for row in ledger.blocks)
    for row, error in zip(ledger.blocks, measure_blocks(tuned), strict=True):
        assert error == pytest.approx(min(row.error_tuned, row.error_solved), rel=1e-3)


def test_a_block_that_gets_worse_stays_as_it_was() -> None:
    plain, _ = solve(Int4Config(group=32), None)
    wild, ledger = solve(Int4Config(group=32), ReconstructionConfig(steps=4, learning_rate=0.99, scale_rate=0.99))
    assert not any(row.tuned for row in ledger.blocks)
    assert all(row.error_tuned > row.error_solved for row in ledger.blocks)
    for one, other in zip(jax.tree.leaves(wild), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_tuning_that_diverges_is_told_and_ends_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second layer the dense output is NaN where it is tuned on: its latents are, and JSON knows no NaN."""
    real = Reconstructor.tune

    def spoil(self, layer, block, packed, formats, data):
        if layer == 1:
            batches = len(data.inputs) // CALIBRATION.batch
            order = np.random.default_rng((CALIBRATION.seed, layer)).permutation(batches)
            first = order[self._config.count_held(batches)] * CALIBRATION.batch
            targets = data.targets.copy()
            targets[first] = np.nan
            data = dataclasses.replace(data, targets=targets)
        return real(self, layer, block, packed, formats, data)

    format, config = Int4Config(group=32), dataclasses.replace(TUNING, steps=2)
    monkeypatch.setattr(Reconstructor, "tune", spoil)
    with Workbench(tmp_path / "bench", {}) as workbench:
        found, ledger = solve(format, config, workbench)
    row = ledger.blocks[1]
    assert row.error_tuned is None and not row.tuned and np.isfinite(row.error_solved)
    assert row.note == "tuning diverged to nan; the block stays as it was solved"
    assert [bool(other.note) for other in ledger.blocks] == [False, True, False, False]
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(found))
    with Workbench(tmp_path / "bench", {}) as workbench:
        again, ledger_again = solve(format, config, workbench)
    assert ledger_again.to_dict() == ledger.to_dict()
    ledger.write(tmp_path / "ledger.json")
    assert json.loads((tmp_path / "ledger.json").read_text())["blocks"][1]["error_tuned"] is None


def test_the_ledger_tells_what_the_packed_block_gives() -> None:
    tuned, ledger = solve(NMInt4Config(n=2, m=4, group=32), TUNING)
    for row, error in zip(ledger.blocks, measure_blocks(tuned), strict=True):
        assert error == pytest.approx(row.error_tuned, rel=1e-3)


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
    with Workbench(tmp_path, {}) as workbench:
        whole, ledger = solve(format, config, workbench)
    for name in ("layer_0002", "layer_0003"):
        (tmp_path / f"{name}.json").unlink()
    with Workbench(tmp_path, {}) as workbench:
        again, ledger_again = solve(format, config, workbench)
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


def test_outliers_are_refused_before_work() -> None:
    """As one format and as a candidate; of the head, which is not tuned, they are welcome."""
    model, outliers = trained_model(), OutliersConfig(base=Int4Config(group=32))
    fine = make_recipe(Int4Config(group=32), TUNING)
    rules = tuple(Rule(pattern=name, format=outliers, solver=FeedbackConfig()) for name in ("embed", "layers.mlp.up"))
    with pytest.raises(InputError, match="^layers.mlp.up: reconstruction cannot tune outliers; give rule 'layers.mlp"):
        match_weights(dataclasses.replace(fine, rules=rules), model)
    assert len(match_weights(dataclasses.replace(fine, rules=(rules[0], *fine.rules)), model)) == 8


def test_a_recipe_that_has_nothing_to_tune_is_refused() -> None:
    with pytest.raises(InputError, match="no rule has a solver"):
        RecipeConfig(rules=(Rule(pattern="*", format=Int4Config(group=32)),), reconstruction=TUNING)
    single = dataclasses.replace(CALIBRATION, tokens=CALIBRATION.batch * CALIBRATION.sequence_length)
    with pytest.raises(InputError, match=f"calibration.batch={single.batch}"):
        dataclasses.replace(make_recipe(Int4Config(group=32), TUNING), calibration=single)
