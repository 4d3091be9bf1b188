"""`hsai compress`: what it makes, and what it refuses before anything is made."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hsai.cli import main
from hsai.cli.compress import check_target
from hsai.cli.page import TRACED
from hsai.cli.targets import check_apart
from hsai.compress import Ledger, RecipeConfig, compress, plan_recipe
from hsai.compress.factor import factorize
from hsai.config import RunConfig
from hsai.config_file import load_config
from hsai.configuration import to_dict
from hsai.data.corpus_files import open_corpus
from hsai.errors import InputError
from hsai.export.bundle import read_bundle
from hsai.export.history import STEP, tell_history
from hsai.export.source import inspect_model
from hsai.models import Transformer
from hsai.models.transformer import abstract_transformer
from tests.cli.conftest import CALIBRATED, RECIPES, Workshop, recipe
from tests.cli.snapshots import snapshot

ROOT = Path(__file__).resolve().parents[2]
Refuse = Callable[..., str]

ODD_RECIPE = """
from hsai.compress.recipe import RecipeConfig, Rule
from hsai.formats import Int4Config

def get_config():
    return RecipeConfig(rules=(Rule(pattern={pattern!r}, format=Int4Config(group={group})),))
"""


def write_recipe(path: Path, pattern: str = "*", group: int = 64) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(ODD_RECIPE.format(pattern=pattern, group=group))
    return path


def test_each_recipe_gets_a_bundle_and_a_ledger(workshop: Workshop) -> None:
    sizes = {}
    for name in RECIPES:
        bundle = read_bundle(workshop.compressed / name)
        extra = bundle.manifest.extra
        assert bundle.manifest.graphs == () and extra["recipe_name"] == name and extra["step"] == 6
        assert extra["ledger"] and f"wrote {workshop.compressed / name}" in workshop.said
        sizes[name] = (workshop.compressed / name / "weights.safetensors").stat().st_size
    assert sizes["bf16"] > sizes["int8"] > sizes["int4"] and sizes["int8"] > sizes["nm24_int4"]


def test_one_recipe_goes_to_out_itself(workshop: Workshop, place: Path) -> None:
    assert main(["compress", str(workshop.run), "--recipe", recipe("int8"), "--out", "new/int8"]) == 0
    made, before = (
        json.loads((b / "manifest.json").read_text()) for b in (Path("new/int8"), workshop.compressed / "int8")
    )
    assert made["files"] == before["files"]  # to the byte


def test_models_that_are_none(workshop: Workshop, place: Path, refuse: Refuse) -> None:
    for name in ("empty", "started/checkpoints"):
        (place / name).mkdir(parents=True)
    (place / "file").write_text("x")
    words = ("--recipe", recipe("int4"), "--out", "out")
    refuse("compress", "nowhere", *words, names=("nowhere", "does not exist", "a bundle"))
    refuse("compress", "empty", *words, names=("empty", "checkpoints", "manifest.json"))
    refuse("compress", "file", *words, names=("file", "not a GGUF file"))
    refuse("compress", "started", *words, names=("started/checkpoints", "no checkpoint"))
    packed = workshop.compressed / "int4"
    other = ("--recipe", recipe("int8"), "--out", "out")
    refuse("compress", packed, *other, names=("int4 already", "dense"), beside=(packed,))


def test_a_damaged_checkpoint(workshop: Workshop, place: Path, refuse: Refuse) -> None:
    shutil.copytree(workshop.run, place / "run")
    state = place / "run" / "checkpoints" / "6" / "state"
    largest = max((path for path in state.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    words = ("--recipe", recipe("int4"), "--out", "out")
    refuse("compress", "run", *words, names=("checkpoint 6", largest.name, "altered"))


def test_an_altered_tokenizer_of_a_run(workshop: Workshop, place: Path, refuse: Refuse) -> None:
    """Of two words that change places, no checksum of the weights would know."""
    shutil.copytree(workshop.run, place / "run")
    tokenizer = place / "run" / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace(": 300,", ": @,").replace(": 301,", ": 300,").replace(": @,", ": 301,"))
    assert tokenizer.read_text() != text
    refuse("compress", "run", "--recipe", recipe("int8"), "--out", "new", names=("run/tokenizer.json was altered",))


def test_recipes_that_cannot_be(workshop: Workshop, place: Path, refuse: Refuse) -> None:
    same, idle, odd = (
        write_recipe(place / "mine" / "int4.py"),
        write_recipe(place / "idle.py", pattern="layers.atention.*"),
        write_recipe(place / "odd.py", group=96),
    )
    words = ("compress", workshop.run, "--out", "out", "--recipe")
    beside = (workshop.run,)
    refuse(*words, "nowhere.py", names=("nowhere.py",), beside=beside)
    refuse(*words, recipe("int4"), same, names=("int4.py", "name of its own"), beside=beside)
    # The first recipe is fine, and still nothing is made: all are checked before any is followed.
    refuse(*words, same, idle, names=("recipe idle", "'layers.atention.*'", "layers.attention."), beside=beside)
    refuse(*words, same, odd, names=("96",), beside=beside)
    slow = ("recipe sparse50", "no kernel for cpu multiplies by unstructured 32:64 bfloat16", "int8, int4 g64")
    refuse(*words, same, recipe("sparse50"), names=(*slow, "--target none takes the recipe"), beside=beside)
    slow = ("recipe int3", "no kernel for gpu multiplies by int3 g64", "--target none takes the recipe")
    refuse(*words, same, recipe("int3"), "--target", "gpu", names=slow, beside=beside)


def test_a_format_that_does_not_divide(workshop: Workshop, place: Path, refuse: Refuse) -> None:
    fits, large = write_recipe(place / "fits.py"), write_recipe(place / "large.py", pattern="*.down", group=128)
    large.write_text(large.read_text().replace("*.down", "*").replace("group=128", "group=256"))
    words = ("compress", workshop.run, "--out", "out", "--recipe", fits, large)
    refuse(*words, names=("256",))


@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_a_full_disk_leaves_nothing(
    function: str, monkeypatch: pytest.MonkeyPatch, workshop: Workshop, refuse: Refuse
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, fail)
    recipes = [recipe(name) for name in ("int8", "int4")]
    refuse("compress", workshop.run, "--recipe", *recipes, "--out", "a/b/c", names=("No space left on device",))


def test_what_it_took_is_told_of_the_commit_that_began(
    workshop: Workshop, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout may move on while layers are solved."""
    (place / "mine.py").write_text(CALIBRATED)
    commits = iter(["began", "moved", "moved"])
    monkeypatch.setattr("hsai.machine.find_commit", lambda: next(commits))
    assert main(["compress", str(workshop.run), "--recipe", "mine.py", "--out", "out"]) == 0
    extra = read_bundle(place / "out").manifest.extra
    assert extra["commit"] == "began" and extra["cost"]["seconds"] > 0 and extra["cost"]["resumed"] == ""
    assert 100 < extra["cost"]["peak_memory_mib"] < 100_000 and extra["cost"]["machine"]["cores"] >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="a mark of /proc")
def test_a_bundle_claims_no_peak_of_the_one_before(
    workshop: Workshop, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hold_much(model: Transformer, recipe: RecipeConfig, **words: Any) -> tuple[Transformer, Ledger]:
        held.append(np.ones((1 << 30) if not held else 1, np.int8).nbytes)
        return compress(model, recipe, **words)

    monkeypatch.setattr("hsai.cli.compress.compress", hold_much)
    words = ["compress", str(workshop.run), "--recipe", recipe("bf16"), recipe("int8"), "--out"]
    held: list[int] = []
    assert main([*words, "new"]) == 0
    first, second = (read_bundle(f"new/{name}").manifest.extra["cost"] for name in ("bf16", "int8"))
    assert first["peak_memory_mib"] > 1024 and 100 < second["peak_memory_mib"] < first["peak_memory_mib"] - 512
    # Where a mark stays, it is that of the first.
    held.clear()
    monkeypatch.setattr("hsai.machine.CLEAR_REFS", place / "none" / "clear_refs")
    assert main([*words, "other"]) == 0
    first, second = (read_bundle(f"other/{name}").manifest.extra["cost"] for name in ("bf16", "int8"))
    assert first["peak_memory_mib"] > 1024 and "peak_memory_mib" not in second and second["seconds"] >= 0


def test_how_a_bundle_was_made_is_the_past_of_what_is_made_of_it(
    workshop: Workshop, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench.frontier_record import list_calibrations

    (place / "sparse.py").write_text(CALIBRATED.replace("Int4Config", "NMConfig"))
    assert main(["compress", str(workshop.run), "--recipe", "sparse.py", "--out", "sparse"]) == 0
    assert main(["compress", "sparse", "--recipe", recipe("nm24_int4"), "--out", "again"]) == 0
    run, first, second = (inspect_model(path) for path in (workshop.run, "sparse", "again"))
    made = {name: first.origin[name] for name in first.origin if name not in run.origin}
    assert set(made) <= set(STEP) and "calibration_sha256" in made and "made_of" not in made
    assert "calibration_sha256" not in second.origin and second.origin["recipe_name"] == "nm24_int4"
    assert {name: second.origin[name] for name in run.origin} == run.origin
    entry = second.origin["made_of"]
    assert entry["sha256"] == first.sha256 == second.origin["source_sha256"]
    assert entry["directory"] == str(place / "sparse") and entry["origin"]["ledger"].items() <= made["ledger"].items()
    assert "weights" not in entry["origin"]["ledger"]
    assert entry["origin"] | {"ledger": made["ledger"]} == made
    assert made["calibration_sha256"] in tell_history(second.origin)["made of"]
    # What llama.cpp is to be calibrated on can still be compared.
    stream = open_corpus(workshop.corpus).train
    (config,) = list_calibrations("again", second.origin, stream)
    assert to_dict(config) == first.origin["recipe"]["calibration"]
    with pytest.raises(InputError, match="again was calibrated on another text"):
        list_calibrations("again", second.origin, stream[1:])
    # Graphs are not passed on either.
    assert main(["compress", str(workshop.bundles / "nm24"), "--recipe", recipe("nm24_int4"), "--out", "plain"]) == 0
    exported, plain = (inspect_model(path).origin for path in (workshop.bundles / "nm24", "plain"))
    assert "graphs" in exported and not {"graphs", "activations"} & set(plain)
    assert plain["made_of"]["origin"]["graphs"] == exported["graphs"]


def test_nothing_that_is_read_is_changed(
    workshop: Workshop, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither by a command that fails half way nor by the one that goes on from there: SHA-256 and time of all."""
    inputs = place / "inputs"
    shutil.copytree(workshop.run, inputs / "run")
    shutil.copytree(workshop.compressed / "bf16", inputs / "bundle")
    for kind, name in (("gguf", "model.gguf"), ("huggingface", "checkpoint")):
        assert main(["export", str(workshop.run), "--to", kind, "--out", str(inputs / name)]) == 0
    (inputs / "mine.py").write_text(CALIBRATED)
    (inputs / "text.txt").write_text("def main():\n    return 42\n" * 400)
    before = snapshot(inputs)
    assert len(before) > 20
    texts = ["--recipe", "inputs/mine.py", "--calibration", "inputs/text.txt"]
    for name in ("run", "bundle", "model.gguf", "checkpoint"):
        words = ["compress", f"inputs/{name}", *texts, "--out", f"out/{name}"]
        calls: list[None] = []

        def fail(gram: jax.Array, damping: float, calls: list[None] = calls) -> Any:
            calls.append(None)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return factorize(gram, damping)

        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr("hsai.compress.solved.factorize", fail)
            assert main(words) == 2
        assert "No space left on device" in capsys.readouterr().err
        assert snapshot(inputs) == before and not (place / "out" / name).exists()
        assert main(words) == 0
        assert "resuming mine, of 2 layers: 1 solved layer" in capsys.readouterr().out
        assert snapshot(inputs) == before and read_bundle(place / "out" / name).manifest.extra["ledger"]


def test_a_format_without_a_kernel_is_told(workshop: Workshop, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And made, where no target is asked for: who wants bytes alone may have it."""
    words = ["compress", str(workshop.run), "--target", "none", "--recipe"]
    assert main([*words, recipe("sparse50"), "--out", "out"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "note: recipe sparse50: " in told and "no kernel for cpu multiplies by unstructured 32:64" in told
    assert main([*words, recipe("int4"), "--out", "other"]) == 0
    assert "no kernel" not in capsys.readouterr().out


def test_the_target_is_this_machine_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a platform that is none of those with kernels nothing is asked of it."""
    model = load_config(ROOT / "configs" / "tiny.py", RunConfig).config.model
    plan = plan_recipe(load_config(recipe("int3"), RecipeConfig).config, abstract_transformer(model))
    check_target("int3", plan, None)
    for platform, passes in (("gpu", False), ("metal", True)):
        monkeypatch.setattr("hsai.cli.compress.find_platform", lambda platform=platform: platform)
        with contextlib.nullcontext() if passes else pytest.raises(InputError, match="no kernel for gpu .* int3 g64"):
            check_target("int3", plan, None)
        check_target("int3", plan, "none")
        check_target("int3", plan, "cpu")


def test_what_failed_is_told_on_the_console(
    workshop: Workshop, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(gram: object, damping: float) -> None:
        raise FloatingPointError("no factor")

    (place / "mine.py").write_text(CALIBRATED)
    monkeypatch.setattr("hsai.compress.solved.factorize", fail)
    assert main(["compress", str(workshop.run), "--recipe", "mine.py", "--out", "out"]) == 0
    assert "layers.mlp.down, layer 0, 1: rounded plainly: no factor\n" in capsys.readouterr().out


def test_the_model_is_not_replaced_by_what_is_made_of_it(workshop: Workshop, place: Path, refuse: Refuse) -> None:
    bundle = Path(shutil.copytree(workshop.compressed / "bf16", place / "sub" / "bf16"))
    (place / "link").symlink_to(bundle)
    words = ("compress", "sub/bf16", "--recipe", recipe("int8"), "--overwrite", "--out")
    refuse(*words, "sub/bf16", names=("--out sub/bf16 is the model itself",))
    refuse(*words, "sub/../link", names=("--out sub/../link is the model itself",))
    refuse(*words, bundle / "int8", names=("lies inside the model sub/bf16",))
    shutil.copytree(bundle, bundle / "inner")
    refuse("compress", bundle / "inner", *words[2:], bundle, names=(f"--out {bundle} holds the model",))


@pytest.mark.parametrize("inside", ["checkpoints", "checkpoints/7", "checkpoints/6/state", "tensorboard/int8"])
def test_what_training_keeps_is_no_place_for_a_bundle(
    inside: str, workshop: Workshop, place: Path, refuse: Refuse
) -> None:
    """A bundle in a directory `checkpoints/7` would be the newest step of the run. Of other runs too."""
    out = workshop.run / inside
    words = ("--recipe", recipe("int8"), "--overwrite", "--out", out)
    told = (f"--out {out} is or lies in {workshop.run / Path(inside).parts[0]}", "which a training run keeps")
    before = snapshot(workshop.run)
    for model in (workshop.run, workshop.compressed / "bf16"):
        refuse("compress", model, *words, names=told)
    assert snapshot(workshop.run) == before


def test_other_checkpoints_are_no_run(workshop: Workshop, place: Path) -> None:
    (place / "checkpoints").mkdir()
    check_apart([Path("checkpoints/int8")], workshop.run)


def test_a_mesh_packs_what_one_device_does(workshop: Workshop, place: Path, refuse: Refuse) -> None:
    (place / "mine.py").write_text(CALIBRATED)
    words = ["compress", str(workshop.run), "--recipe", "mine.py"]
    assert main([*words, "--out", "one"]) == 0 and main([*words, "--out", "eight", "--mesh", "2x2x2"]) == 0
    one, eight = (read_bundle(place / name) for name in ("one", "eight"))
    assert set(TRACED) - {"checkpoint"} <= set(one.manifest.extra)  # what the page looks for is what is written
    first, second = (bundle.model.layers.mlp.down.get_value().dense() for bundle in (one, eight))
    assert np.isclose(first, second, rtol=1e-2, atol=1e-4).mean() > 0.99
    errors = [[row["output_error"] for row in each.manifest.extra["ledger"]["layers"]] for each in (one, eight)]
    np.testing.assert_allclose(*errors, rtol=1e-2)
    words[-1:] = ["mine.py", "--out", "out", "--mesh"]
    refuse(*words, "2x2", names=("--mesh 2x2 is no mesh", "4x1x2"))
    told = ("--mesh 3x1x1: mesh data=3", "needs 3 devices, and there are 8", "JAX_NUM_CPU_DEVICES=3 in front")
    refuse(*words, "3x1x1", names=told)
    refuse(*words, "1x1x8", names=("mesh.model=8", "model."))
    (place / "mine.py").write_text(CALIBRATED.replace("tokens=512", "tokens=768"))  # 12 windows, in batches of 8
    told = ("recipe mine: the 12 windows of calibration.tokens=768", "batches of 8", "batch=4", "multiple of 512")
    refuse(*words, "8x1x1", names=told)


def test_a_cpu_is_made_of_as_many_devices_as_the_variable_says(workshop: Workshop, place: Path) -> None:
    """What the refusal of a mesh says is what has to be done."""
    (place / "mine.py").write_text(CALIBRATED)
    words = ["compress", str(workshop.run), "--recipe", "mine.py", "--out", "out", "--mesh", "1x2x1"]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    command = [sys.executable, "-m", "hsai.cli", *words]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 2 and "JAX_NUM_CPU_DEVICES=2 in front of the command" in found.stderr, found.stderr
    environment["JAX_NUM_CPU_DEVICES"] = "2"
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0 and read_bundle(place / "out").manifest.extra["mesh"] == "1x2x1", found.stderr
