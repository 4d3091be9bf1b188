"""Graphs run without jax: IREE compiles what a bundle ships, and makes the tokens that hsai makes."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hsai.data.tokenizer import Tokenizer
from hsai.export import read_bundle, write_bundle
from hsai.export.stablehlo import GraphConfig
from hsai.infer import Engine
from tests.export.tiny_models import make_model
from tests.needs import needs

pytestmark = needs(
    bool(find_spec("iree") and find_spec("iree.compiler")), "no IREE: pip install 'hsai[interop]' brings it"
)
SCRIPT = Path(__file__).parents[2] / "scripts" / "run_with_iree.py"
LARGEST = 16
"""Tokens of the largest prefill graph."""

PROMPTS = (
    "def main(argument):\n    return",
    "import numpy as np, jax",
    "class Reader(Writer):",
    "except for 1 return return",
)
"""Longer than that, so that they are read by one call after the other."""


def generate(bundle: Path, count: int) -> tuple[str, tuple[int, ...]]:
    """A prompt that this random model continues with more than one token over and over, and that continuation."""
    engine = Engine.load(bundle, graphs=True)
    made = [(prompt, engine.generate(prompt, max_tokens=count).tokens) for prompt in PROMPTS]
    found = max(made, key=lambda pair: len(set(pair[1])))
    assert len(set(found[1])) > 2 and min(len(engine.encode_prompt(prompt)) for prompt in PROMPTS) > LARGEST
    return found


def run_script(bundle: Path, prompt: str, count: int) -> subprocess.CompletedProcess[str]:
    """The script's run, where jax cannot be imported."""
    program = f"import sys; sys.modules['jax'] = None; sys.argv = sys.argv[1:]; exec(open({str(SCRIPT)!r}).read())"
    command = [sys.executable, "-c", program, str(SCRIPT), str(bundle), prompt, str(count)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def check(bundle: Path, count: int) -> None:
    """The script continues a prompt as hsai does."""
    prompt, expected = generate(bundle, count)
    done = run_script(bundle, prompt, len(expected))
    assert done.returncode == 0, done.stderr
    *text, tokens = done.stdout.splitlines()
    assert tuple(map(int, tokens.split())) == expected
    assert "\n".join(text).startswith(prompt)


@pytest.mark.parametrize("name", ["dense", "int4", "nm_int4", "vnm_int4"])
def test_iree_makes_the_same_greedy_tokens(name: str, bundles: dict[str, Path]) -> None:
    check(bundles[name], 16)


def test_iree_runs_an_int8_cache_and_bfloat16(tokenizer: Tokenizer, tmp_path: Path) -> None:
    graphs = GraphConfig(prefill_buckets=(LARGEST,), cache="int8")
    write_bundle(tmp_path / "bundle", make_model("nm_int8", dtype="bfloat16"), tokenizer, graphs=graphs)
    assert read_bundle(tmp_path / "bundle").config.dtype == "bfloat16"
    check(tmp_path / "bundle", 4)


def test_iree_reads_the_oldest_version_that_is_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    graphs = GraphConfig(prefill_buckets=(LARGEST,), stablehlo_version="0.9.0")
    write_bundle(tmp_path / "bundle", make_model("int4"), tokenizer, graphs=graphs)
    check(tmp_path / "bundle", 4)


def test_a_context_that_is_too_short_is_said_at_once(bundles: dict[str, Path]) -> None:
    """With the prefix there are 40 tokens; of 48 slots none is for the last new one."""
    done = run_script(bundles["dense"], "\x01" * 39, 10)
    assert (done.returncode, done.stdout) == (2, "")
    message = "run_with_iree.py: 40 + 10 tokens exceed a context of 48\n"
    assert done.stderr == message
