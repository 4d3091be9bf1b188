"""A training step compiles for 8 chips of a TPU v5e, by the real XLA:TPU and Mosaic, with kernels on each chip."""

import sys
from pathlib import Path

import pytest

from hsai_kernels.aot.runner import TARGETS, run_apart
from tests.needs import needs

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".aot" / "tpu"


@pytest.mark.slow
@needs(
    FOLDER.is_dir(),
    f"no compiler for TPUs in {FOLDER}: bash scripts/install_aot.sh {sys.executable} brings it",
)
def test_a_training_step_for_a_mesh_holds_the_kernels_and_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where `tests` is found
    kernels, chunked = run_apart(TARGETS["tpu"], FOLDER, ["-m", "tests.train.aot_step"])
    # Forward once more in the backward pass: blocks are rematerialized.
    assert kernels["calls"] == {
        "attention_forward": 2,
        "attention_backward_queries": 1,
        "attention_backward_keys": 1,
        "cross_entropy_backward": 1,
    }
    assert set(chunked["calls"].values()) == {0}
    for size in ("peak_bytes", "temporary_bytes"):
        assert kernels[size] <= chunked[size], size
