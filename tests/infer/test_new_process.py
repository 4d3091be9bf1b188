"""The deployer's proof: shipped graphs, loaded in a new process on one device, compute what the model computes here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hsai.export import read_bundle
from hsai.infer import Engine
from hsai_kernels import prefer
from tests.export.tiny_models import FORMATS, full_logits

TOLERANCE = 2e-5
"""Largest difference of float32 logits of order one: sums are taken in another order in a graph of fixed shapes."""

PROMPT = [0, 17, 250, 3, 99, 41, 7, 200, 5, 5, 130, 61, 12, 270, 33, 8, 90, 77, 2, 145, 19]
FOLLOWING = [6, 111, 44]

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from hsai.infer import Engine

prompt, following = json.loads(sys.argv[1])
result = {"devices": jax.device_count(), "tokens": {}}
logits = {}
for directory in sys.argv[3:]:
    name = directory.rsplit("/", 1)[-1]
    engine = Engine.load(directory, graphs=True)
    runtime = engine.runtime
    step, cache = runtime.prefill(np.array(prompt, np.int32), runtime.make_pages(1))
    steps = [step]
    for token in following:
        step, cache = runtime.decode(jnp.array([token], jnp.int32), cache)
        steps.append(step)
    logits[name] = np.concatenate(steps)
    result["tokens"][name] = engine.generate_tokens(prompt, max_tokens=12).tokens
np.savez(sys.argv[2], **logits)
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def computed(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict[str, np.ndarray]]:
    """What the new process says, and its logits (1 + len(FOLLOWING), V) of each format."""
    arrays = tmp_path_factory.mktemp("computed") / "logits.npz"
    environment = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    arguments = [json.dumps([PROMPT, FOLLOWING]), str(arrays), *map(str, bundles.values())]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), dict(np.load(arrays))


@pytest.mark.parametrize("name", FORMATS)
def test_shipped_graphs_give_the_logits_of_the_model(
    name: str, computed: tuple[dict, dict[str, np.ndarray]], bundles: dict[str, Path]
) -> None:
    result, logits = computed
    assert result["devices"] == 1
    with prefer("reference"):
        expected = full_logits(read_bundle(bundles[name]).model, np.array(PROMPT + FOLLOWING))[len(PROMPT) - 1 :]
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(logits[name], expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", FORMATS)
def test_shipped_graphs_and_this_machines_kernels_choose_the_same_tokens(
    name: str, computed: tuple[dict, dict[str, np.ndarray]], bundles: dict[str, Path]
) -> None:
    here = Engine.load(bundles[name]).generate_tokens(PROMPT, max_tokens=12)
    # Of these random models, that of int2 happens to end its text after two tokens.
    assert len(here.tokens) == (2 if name == "int2" else 12) and len(set(here.tokens)) > 1
    assert tuple(computed[0]["tokens"][name]) == here.tokens
