"""One tiny run, trained, compressed and exported through the command line, that all tests of it share."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hsai.cli import main
from hsai.export import write_bundle
from hsai.export.source import open_model
from tests.cli.snapshots import snapshot

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TINY = str(CONFIGS / "tiny.py")
RECIPES = ("bf16", "int8", "int4", "nm24", "nm24_int4")
SHORT = ("--train.steps", "6", "--data.max-bytes", "200000", "--train.evaluate-tokens", "1000")

CALIBRATED = """
from hsai.compress.solvers import FeedbackConfig
from hsai.compress.calibration import CalibrationConfig
from hsai.compress.recipe import RecipeConfig, Rule
from hsai.formats import Int4Config

def get_config():
    return RecipeConfig(
        rules=(Rule(pattern="layers.mlp.down", format=Int4Config(), solver=FeedbackConfig()),),
        calibration=CalibrationConfig(tokens=512, sequence_length=64, batch=4),
    )
"""
"""A recipe whose weights of one name are solved over calibration."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workshop:
    """What the commands made; not to be changed by a test."""

    run: Path
    """Of `hsai train`."""

    corpus: Path
    """What it was trained on."""

    compressed: Path
    """Of `hsai compress`: a bundle a recipe."""

    bundles: Path
    """Of `hsai export`: the same with graphs."""

    said: str
    """What the commands printed."""


def recipe(name: str) -> str:
    """The path of one of the repository's recipes."""
    return str(CONFIGS / "compress" / f"{name}.py")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:

    base = tmp_path_factory.mktemp("workshop")
    made = {name: base / name for name in ("run", "corpus", "compressed", "bundles")}
    where = ("--directory", str(made["run"]), "--data-directory", str(made["corpus"]))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["train", TINY, *SHORT, *where]) == 0
        recipes = [recipe(name) for name in RECIPES]
        assert main(["compress", str(made["run"]), "--recipe", *recipes, "--out", str(made["compressed"])]) == 0
        models = [str(made["compressed"] / name) for name in RECIPES]
        assert main(["export", *models, "--out", str(made["bundles"]), "--prefill-buckets", "8", "32"]) == 0
    return Workshop(**made, said=said.getvalue())


TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="session")
def talking(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a chat template, made by compressing one that has it."""
    base = tmp_path_factory.mktemp("talking")
    source = open_model(workshop.run)
    generation = {"do_sample": True, "temperature": 1.5, "top_k": 40, "max_new_tokens": 7}
    generation |= {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3}
    assets = {"chat_template.jinja": TEMPLATE.encode(), "generation_config.json": json.dumps(generation).encode()}
    write_bundle(base / "plain", source.model, source.tokenizer, assets=assets)
    assert main(["compress", str(base / "plain"), "--recipe", recipe("int8"), "--out", str(base / "int8")]) == 0
    assert main(["export", str(base / "int8"), "--out", str(base / "out"), "--prefill-buckets", "8"]) == 0
    return base / "out"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refuse(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused: status 2, one line that names every one of `names`, nothing changed."""

    def run(*words: str | Path, names: tuple[str, ...], beside: tuple[Path, ...] = ()) -> str:
        before = [snapshot(directory) for directory in (place, *beside)]
        capsys.readouterr()
        status = main([str(word) for word in words])
        error = capsys.readouterr().err
        assert status == 2
        assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
        assert [name for name in names if name not in error] == [], error
        assert [snapshot(directory) for directory in (place, *beside)] == before
        return error

    return run
