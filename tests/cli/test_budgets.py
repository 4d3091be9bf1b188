"""`hsai compress --budget` and `--bits-per-weight`: what they spend, on what was measured once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hsai.cli import main
from hsai.compress import sensitivity
from hsai.export.bundle import read_bundle
from tests.cli.conftest import Workshop, recipe

Refuse = Callable[..., str]

BUDGET_RECIPE = """
from hsai.compress.allocate import AllocationConfig
from hsai.compress.solvers import FeedbackConfig
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


def test_several_budgets_are_spent_on_one_measurement(
    workshop: Workshop, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each bundle is the one that its budget alone would have made."""
    (place / "mine.py").write_text(BUDGET_RECIPE)
    words = ["compress", str(workshop.run), "--recipe", "mine.py"]
    assert main([*words, "--out", "alone", "--bits-per-weight", "3.5"]) == 0
    capsys.readouterr()
    real, seen = sensitivity.sum_gradients, []
    monkeypatch.setattr(sensitivity, "sum_gradients", lambda *a, **w: (seen.append(1), real(*a, **w))[1])
    assert main([*words, "--out", "all", "--bits-per-weight", "4.5", "3.5"]) == 0
    assert len(seen) == 1
    assert "mine_3.5: what its candidates cost was measured for the budget before" in capsys.readouterr().out
    assert {path.name for path in (place / "all").iterdir()} == {"mine_4.5", "mine_3.5"}
    found, wanted = (read_bundle(place / name).manifest for name in ("all/mine_3.5", "alone"))
    assert found.files["weights.safetensors"] == wanted.files["weights.safetensors"]
    assert found.extra["ledger"] == wanted.extra["ledger"] and found.extra["recipe"] == wanted.extra["recipe"]
    assert read_bundle(place / "all/mine_4.5").manifest.extra["recipe"]["allocation"]["bits_per_weight"] == 4.5


def test_budgets_that_cannot_be(workshop: Workshop, place: Path, refuse: Refuse) -> None:
    (place / "mine.py").write_text(BUDGET_RECIPE)
    words = ("compress", workshop.run, "--out", "out", "--recipe", "mine.py")
    refuse(*words, "--budget", "5KB", names=("recipe mine: a budget of 5,000 bytes cannot be met", "the model has "))
    refuse(*words, "--bits-per-weight", "1.5", names=("recipe mine: a budget of", "cannot be met"))
    refuse(*words, "--budget", "60", names=("--budget 60 is no size", "500MB"))
    refuse(*words, "--budget", "0MB", names=("--budget 0MB is no size",))
    refuse(*words, "--bits-per-weight", "0", names=("--bits-per-weight 0", "above 0 and at most 32"))
    refuse(*words, "--bits-per-weight", "few", names=("--bits-per-weight", "'few'"))
    refuse(*words, "--budget", "1MB", "2MB", "1MB", names=("--budget 1MB 2MB 1MB: one is there twice",))
    refuse(*words, "--bits-per-weight", "3", "60", names=("--bits-per-weight 60", "at most 32"))
    refuse(*words, "--budget", "1MB", "--bits-per-weight", "3", names=("--budget", "--bits-per-weight", "one of them"))
    refuse(*words, recipe("int4"), "--budget", "1MB", names=("--budget: recipe int4 leaves no choice of formats",))
