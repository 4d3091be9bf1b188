"""Graphs run without jax: IREE compiles what a bundle ships, and makes the tokens that hsai makes."""

import subprocess
import sys
from pathlib import Path

import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.export import read_bundle, write_bundle
from hsai.export.stablehlo import GraphConfig
from hsai.infer import Engine
from tests.export.tiny_models import make_model

pytest.importorskip("iree.compiler", reason="pip install 'hsai[interop]' brings IREE")
SCRIPT = Path(__file__).parents[2] / "scripts" / "run_with_iree.py"
PROMPTS = ("def main(argument):\n    return", "import numpy", "class Reader:", "0 1 2 3 4", "return None")


def generate(bundle: Path, count: int) -> tuple[str, tuple[int, ...]]:
    """A prompt that this random model continues with more than one token over and over, and that continuation."""
    engine = Engine.load(bundle, graphs=True)
    made = [(prompt, engine.generate(prompt, max_tokens=count).tokens) for prompt in PROMPTS]
    found = max(made, key=lambda pair: len(set(pair[1])))
    assert len(set(found[1])) > 2
    return found


def run_with_iree(bundle: Path, prompt: str, count: int) -> list[str]:
    """What the script prints."""
    program = f"import sys; sys.modules['jax'] = None; sys.argv = sys.argv[1:]; exec(open({str(SCRIPT)!r}).read())"
    done = subprocess.run(
        [sys.executable, "-c", program, str(SCRIPT), str(bundle), prompt, str(count)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["dense", "int4", "nm_int4"])
def test_iree_makes_the_same_greedy_tokens(name: str, bundles: dict[str, Path]) -> None:
    prompt, expected = generate(bundles[name], 16)
    *text, tokens = run_with_iree(bundles[name], prompt, len(expected))
    assert tuple(map(int, tokens.split())) == expected
    assert "\n".join(text).startswith(prompt)


def test_iree_runs_an_int8_cache_and_bfloat16(tokenizer: Tokenizer, tmp_path: Path) -> None:
    graphs = GraphConfig(prefill_buckets=(16,), cache="int8")
    write_bundle(tmp_path / "bundle", make_model("nm_int8", dtype="bfloat16"), tokenizer, graphs=graphs)
    assert read_bundle(tmp_path / "bundle").config.dtype == "bfloat16"
    prompt, expected = generate(tmp_path / "bundle", 4)
    *_, tokens = run_with_iree(tmp_path / "bundle", prompt, len(expected))
    assert tuple(map(int, tokens.split())) == expected
