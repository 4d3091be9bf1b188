"""A run that is killed goes on where it was, and ends in the same bits; what does not belong to it is not used."""

import contextlib
import dataclasses
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from hsai.compress import RecipeConfig, Rule, block_solver, calibrated, compress, sensitivity
from hsai.compress.allocate import AllocationConfig
from hsai.compress.calibration import CalibrationConfig, draw_windows
from hsai.compress.resume import Workbench
from hsai.compress.solvers import FeedbackConfig
from hsai.data.tokenizer import Tokenizer
from hsai.errors import InputError
from hsai.export import read_bundle, write_bundle
from hsai.formats import Int4, Int4Config, Int8Config, NMInt4Config
from hsai.formats.storage import named_weights
from hsai.models import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab=96, embed=64, layers=3, heads=2, kv_heads=1, head_dim=32, mlp=128, max_length=64, dtype="bfloat16"
)
CALIBRATION = CalibrationConfig(tokens=256, sequence_length=32, batch=4)
TOKENS = draw_windows(np.random.default_rng(0).integers(0, 96, 1000), CALIBRATION)
RECIPE = RecipeConfig(
    rules=(
        Rule(
            pattern="layers.mlp.*",
            format=(Int4Config(group=32), NMInt4Config(n=2, m=4, group=32)),
            solver=FeedbackConfig(),
        ),
        Rule(pattern="layers.attention.*", format=Int8Config(), solver=FeedbackConfig()),
    ),
    calibration=CALIBRATION,
    allocation=AllocationConfig(bits_per_weight=12.0, windows=4),
)


class Killed(Exception):
    """What a test ends a run with."""


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


def run(model: Transformer, directory: Path | None) -> tuple[Transformer, dict, list[str]]:
    """The model, its ledger, and what progress was told, each step once."""
    told: list[str] = []
    with contextlib.nullcontext() if directory is None else Workbench(directory, {"recipe": "a"}) as workbench:
        found, ledger = compress(
            model, RECIPE, calibration=TOKENS, workbench=workbench, progress=lambda step, done, total: told.append(step)
        )
    return found, ledger.to_dict(), list(dict.fromkeys(told))


def test_a_killed_run_ends_in_the_same_bits(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, ledger, told = run(model, None)
    assert told == ["measuring gradients", "trying formats", "calibrating", "compressing"]
    real, solved = block_solver.pack_solved, []

    def fail_in_second_layer(*arguments):
        solved.append(1)
        if len(solved) == per_run + 9:
            raise Killed
        return real(*arguments)

    per_run = 3 * 3 * 2  # each candidate of each layer was tried before
    monkeypatch.setattr(block_solver, "pack_solved", fail_in_second_layer)
    with pytest.raises(Killed):
        run(model, tmp_path / "bench")
    assert len(list((tmp_path / "bench").glob("layer_*.json"))) == 1
    solved.clear()
    per_run = 1000
    again, ledger_again, told = run(model, tmp_path / "bench")
    assert told == ["calibrating", "compressing"]  # the budget was spent before
    assert len(solved) == 2 * 7
    assert ledger_again == ledger
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_that_was_killed_at_its_trials_repeats_none(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ledger, _ = run(model, None)
    real, solved = block_solver.pack_solved, []

    def fail_in_second_layer(*arguments):
        solved.append(1)
        if len(solved) == 3 * 2 + 4:  # three weights of a layer have two candidates each
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(block_solver, "pack_solved", fail_in_second_layer)
    with pytest.raises(Killed):
        run(model, tmp_path / "bench")
    assert [path.name for path in (tmp_path / "bench").glob("*_*")] == ["trials_0000.json"]
    with Workbench(tmp_path / "bench", {"recipe": "a"}) as workbench:
        assert workbench._describe() == "trials of 1 layer"
    monkeypatch.setattr(block_solver, "pack_solved", lambda *arguments: solved.append(1) or real(*arguments))
    solved.clear()
    _, again, told = run(model, tmp_path / "bench")
    assert told == ["measuring gradients", "trying formats", "calibrating", "compressing"]
    assert len(solved) == 2 * 3 * 2 + 3 * 7 and again == ledger


def test_a_run_that_was_killed_behind_its_layers_solves_none_again(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the head: the layers are recalled, and calibration passes them once. Behind the head: nothing is run."""
    rule = Rule(pattern="*", format=Int4Config(group=32), solver=FeedbackConfig())
    recipe = RecipeConfig(rules=(rule,), calibration=CALIBRATION)
    whole, ledger = compress(model, recipe, calibration=TOKENS)
    assert [row.weight for row in ledger.layers if row.layer is None] == ["embed"]
    real, count = block_solver.pack_solved, [0]

    def fail(*arguments):
        count[0] += 1
        if count[0] == limit:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(block_solver, "pack_solved", fail)
    limit = 3 * 7 + 1
    with Workbench(tmp_path / "bench", {}) as workbench, pytest.raises(Killed):
        compress(model, recipe, calibration=TOKENS, workbench=workbench)
    monkeypatch.setattr("hsai.compress.one_shot.measure_error", lambda *_: 1 / 0)
    limit, count[0] = 100, 0
    with Workbench(tmp_path / "bench", {}) as workbench, pytest.raises(ZeroDivisionError):
        assert workbench.found == "3 solved layers"
        compress(model, recipe, calibration=TOKENS, workbench=workbench)
    assert count[0] == 1
    monkeypatch.undo()
    monkeypatch.setattr(block_solver, "pack_solved", lambda *_: 1 / 0)
    monkeypatch.setattr(calibrated, "stream_blocks", lambda *_, **__: 1 / 0)
    with Workbench(tmp_path / "bench", {}) as workbench:
        assert workbench.found == "3 solved layers, the head"
        again, ledger_again = compress(model, recipe, calibration=TOKENS, workbench=workbench)
    assert ledger_again.to_dict() == ledger.to_dict()
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_candidate_whose_price_is_no_number_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on to its bundle, and one that was killed reads what it had kept; where nothing else is to be had,
    one is taken without a price."""
    model = Transformer(dataclasses.replace(CONFIG, vocab=300), rngs=nnx.Rngs(0))
    real, up, down = sensitivity._price, model.layers.mlp.up[...][0], model.layers.mlp.down[...][2]

    def price(w, packed, *rest):
        if w.shape == up.shape and bool((w == up).all()) and type(packed) is Int4:
            return jnp.float32(jnp.nan)
        return jnp.float32(jnp.inf) if w.shape == down.shape and bool((w == down).all()) else real(w, packed, *rest)

    def fail(*_):
        raise Killed

    monkeypatch.setattr(sensitivity, "_price", price)
    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "save_allocation", fail)
        with pytest.raises(Killed):
            run(model, tmp_path / "bench")
    found, ledger, told = run(model, tmp_path / "bench")
    assert told == ["calibrating", "compressing"], "all prices were kept"
    monkeypatch.setattr(sensitivity, "_price", fail)
    (tmp_path / "bench" / "allocation.json").unlink()
    again, ledger_again, _ = run(model, tmp_path / "bench")
    assert ledger_again == ledger
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(one, other)

    choices = {(row["weight"], row["layer"]): row for row in ledger["allocation"]["choices"]}
    first = choices["layers.mlp.up", 0]
    assert first["format"] == "2:4 int4 g32" and first["loss"] > 0
    assert [option["loss"] is None for option in first["candidates"]] == [True, False]
    last = choices["layers.mlp.down", 2]
    assert (
        [option["loss"] for option in last["candidates"]]
        == [None, None]
        == [last["loss"], ledger["allocation"]["loss"]]
    )
    others = [row for place, row in choices.items() if place not in {("layers.mlp.up", 0), ("layers.mlp.down", 2)}]
    assert {row["format"] for row in others} == {"int4 g32"}, "the budget is enough for all of them"
    with Workbench(tmp_path / "bench", {"recipe": "a"}) as workbench:
        allocation = workbench.load_allocation()
    assert allocation is not None and allocation.loss is None
    console = Console(width=200, file=io.StringIO())
    console.print(allocation.table())
    rows = [line for line in console.file.getvalue().splitlines() if "layers.mlp" in line]  # type: ignore[attr-defined]
    assert ["no number" in row for row in rows] == ["mlp.down" in row for row in rows] and len(rows) == 3
    write_bundle(tmp_path / "bundle", found, Tokenizer.train(["one two"], 257), extra={"ledger": ledger})
    assert read_bundle(tmp_path / "bundle").manifest.extra["ledger"] == ledger


def test_a_directory_of_another_run_is_thrown_away_and_told(tmp_path: Path) -> None:
    bench = tmp_path / "bench"
    with Workbench(bench, {"recipe": "a", "commit": "1"}) as first:
        assert (first.found, first.changed, first.discarded) == ("", (), "")
    names = ("layer_0000.json", "layer_0001.json", "layer_0001.safetensors", ".layer_0002.ab.safetensors")
    for name in (*names, "scales_head.json", ".scales_0001.ab.safetensors", "scales.json"):
        (bench / name).write_text("{}")
    (bench / "notes.txt").write_text("mine")
    with Workbench(bench, {"recipe": "a", "commit": "1"}) as same:
        assert (same.found, same.changed, same.discarded) == ("2 solved layers", (), "")
    with Workbench(bench, {"recipe": "a", "commit": "2"}) as other:
        assert (other.found, other.changed, other.discarded) == ("", ("commit",), "2 solved layers")
        assert {path.name for path in bench.iterdir()} == {"record.json", "notes.txt", ".lock"}
        other.remove()
    assert [path.name for path in bench.iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        Workbench(tmp_path / "file" / "bench", {})


def test_a_directory_that_no_run_left_is_not_touched(tmp_path: Path) -> None:
    bench = tmp_path / ".out.partial"
    (bench / "inner").mkdir(parents=True)
    (bench / "inner" / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="[.]out[.]partial, where unfinished work is kept, holds something else"):
        Workbench(bench, {})
    assert (bench / "inner" / "thesis.txt").read_text() == "years" and len(list(bench.iterdir())) == 1
    for content in ("[]", "{"):
        (bench / "record.json").write_text(content)
        with pytest.raises(InputError, match="record.json is no"):
            Workbench(bench, {})
        assert (bench / "record.json").read_text() == content


def test_a_run_that_was_cut_off_before_its_record_is_begun_anew(tmp_path: Path) -> None:
    for name in (".lock", ".record.0011aa.json"):
        (tmp_path / name).write_text("")
    with Workbench(tmp_path, {"recipe": "a"}) as workbench:
        assert workbench.found == ""
        assert {path.name for path in tmp_path.iterdir()} == {"record.json", ".lock"}


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    with Workbench(tmp_path, {"recipe": "a"}):
        (tmp_path / "layer_0000.json").write_text("{}")
        for record in ({"recipe": "a"}, {"recipe": "b"}):
            with pytest.raises(InputError, match=f"{tmp_path} is in use by another run"):
                Workbench(tmp_path, record)
        assert (tmp_path / "layer_0000.json").exists()
    with Workbench(tmp_path, {"recipe": "a"}) as workbench:
        assert workbench.found == "1 solved layer"


def test_a_layer_without_its_json_is_not_there(model: Transformer, tmp_path: Path) -> None:
    run(model, tmp_path / "bench")
    with Workbench(tmp_path / "bench", {"recipe": "a"}) as workbench:
        assert workbench.found == "3 solved layers, trials of 3 layers, its allocation"
        shapes = {name: p.get_value().shape[1:] for name, p in named_weights(model).items() if "norm" not in name}
        shapes = {name: shape for name, shape in shapes.items() if name.startswith("layers.")}
        solved = workbench.load_layer(1, shapes)
        assert solved is not None and set(solved.weights) == set(shapes) and len(solved.rows) == 7
        (tmp_path / "bench" / "layer_0001.json").unlink()
        assert workbench.load_layer(1, shapes) is None
        with pytest.raises(InputError, match="do not fit"):
            workbench.load_layer(0, shapes | {"layers.mlp.up": (64, 64)})
        workbench.remove()
    assert not (tmp_path / "bench").exists()
