"""`hsai compress`: what it makes, and what it refuses before anything is made."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hsai.cli import main
from hsai.export.bundle import read_bundle
from tests.cli.conftest import RECIPES, Workshop, recipe

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


BUDGET_RECIPE = """
from hsai.compress.allocate import AllocationConfig
from hsai.compress.calibrated import FeedbackConfig
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig, Rule
from hsai.formats import Int4Config, Int8Config, TernaryConfig

def get_config():
    blocks, tables = (Int8Config(), Int4Config(), TernaryConfig()), (Int8Config(), Int4Config())
    return RecipeConfig(
        rules=(Rule(pattern="layers.*", format=blocks, solver=FeedbackConfig()), Rule(pattern="*", format=tables)),
        calibration=CalibrationConfig(tokens=1024, sequence_length=64, batch=4),
        allocation=AllocationConfig(bits_per_weight=6.0, windows=4),
    )
"""


def test_a_budget_of_the_command_line_is_kept(
    workshop: Workshop, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "mine.py").write_text(BUDGET_RECIPE)
    words = ["compress", str(workshop.run), "--recipe", "mine.py"]
    bytes_of = {}
    for name, option in {"own": [], "bits": ["--bits-per-weight", "4.5"], "size": ["--budget", "250KB"]}.items():
        assert main([*words, "--out", name, *option]) == 0
        said = capsys.readouterr().out
        extra = read_bundle(place / name).manifest.extra
        allocation = extra["ledger"]["allocation"]
        bytes_of[name] = extra["ledger"]["bytes"]
        assert bytes_of[name] <= allocation["budget"] and "nats a token" in said
        assert ("more than the candidates can use" in said) == (allocation["budget"] > allocation["most"])
        assert main(["generate", name, "def ", "--max-tokens", "3"]) == 0
    assert bytes_of["own"] > bytes_of["size"] and bytes_of["own"] > bytes_of["bits"]
    assert extra["recipe"]["allocation"]["bytes"] == 250_000 and allocation["budget"] == 250_000
    # What was made under one budget is not taken for what another would make.
    capsys.readouterr()
    assert main([*words, "--out", "size", "--budget", "250KB", "--reuse"]) == 0
    assert "reusing" in capsys.readouterr().out
    assert main([*words, "--out", "size", "--budget", "1GB", "--reuse", "--overwrite"]) == 0
    assert "more than the candidates can use" in capsys.readouterr().out


def test_budgets_that_cannot_be(workshop: Workshop, place: Path, refuse: Refuse) -> None:
    (place / "mine.py").write_text(BUDGET_RECIPE)
    words = ("compress", workshop.run, "--out", "out", "--recipe", "mine.py")
    refuse(*words, "--budget", "5KB", names=("recipe mine: a budget of 5,000 bytes cannot be met", "the model has "))
    refuse(*words, "--bits-per-weight", "1.5", names=("recipe mine: a budget of", "cannot be met"))
    refuse(*words, "--budget", "60", names=("--budget 60 is no size", "500MB"))
    refuse(*words, "--budget", "0MB", names=("--budget 0MB is no size",))
    refuse(*words, "--bits-per-weight", "0", names=("--bits-per-weight 0", "above 0 and at most 32"))
    refuse(*words, "--bits-per-weight", "few", names=("--bits-per-weight", "'few'"))
    refuse(*words, "--budget", "1MB", "--bits-per-weight", "3", names=("--budget", "--bits-per-weight", "one of them"))
    refuse(*words, recipe("int4"), "--budget", "1MB", names=("--budget: recipe int4 leaves no choice of formats",))
