"""Bundles of every version of the format are read, and compute what they computed then.

hsai itself had no release yet: each version of the format counts, since bundles of it may lie anywhere.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hsai.export import read_bundle
from hsai.export.manifest import FORMAT_VERSION
from hsai.infer import Engine
from hsai.infer.defaults import read_defaults
from hsai_kernels import prefer
from tests.export.golden_bundles import GOLDEN, LOGITS, PACKS, PROMPT
from tests.export.tiny_models import full_logits

BUNDLES = sorted(path.parent for path in GOLDEN.glob("*/*/manifest.json"))
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.05}
"""Of logits of order one: the sums of another jax or processor are taken in another order."""


def test_each_version_and_each_format_is_there() -> None:
    assert {int(path.parent.name) for path in BUNDLES} == set(range(1, FORMAT_VERSION + 1))
    current = [path for path in BUNDLES if path.parent.name == str(FORMAT_VERSION)]
    kinds = {kind for path in current for kind in (path / "manifest.json").read_text().split('"') if kind in PACKS}
    assert kinds == set(PACKS)


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_it_computes_what_it_computed(path: Path) -> None:
    bundle = read_bundle(path)
    expected = np.load(path.with_name(f"{path.name}_{LOGITS}"))
    with prefer("reference"):
        found = full_logits(bundle.model, np.array(PROMPT))
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[bundle.config.dtype], rtol=0)


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_its_graphs_run(path: Path) -> None:
    engine = Engine.load(path, graphs=True)
    runtime = engine.runtime
    logits, cache = runtime.prefill(np.array(PROMPT[:-1], np.int32), runtime.make_pages(1))
    logits, _ = runtime.decode(jnp.array(PROMPT[-1:], jnp.int32), cache)
    expected = np.load(path.with_name(f"{path.name}_{LOGITS}"))[-1]
    rounding = 0.1 if read_bundle(path).config.dtype == "bfloat16" else TOLERANCE["float32"]  # and an int8 cache
    np.testing.assert_allclose(jax.device_get(logits)[0], expected, atol=rounding, rtol=0)
    assert engine.tokenizer.stops and read_defaults(engine.assets.generation_config).temperature == 0.7
