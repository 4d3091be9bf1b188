"""Every GPU kernel compiles for an A100 and an H100, without spilling registers; no GPU is needed.

What is compiled here must agree with the table that scripts/write_capabilities.py writes.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hsai_kernels.aot_cases import KERNELS
from hsai_kernels.aot_gpu import CHIPS, Row, compile_kernels
from hsai_kernels.capabilities import find_differences, read_capabilities

FOLDER = Path(__file__).resolve().parents[2] / ".aot" / "gpu"
pytestmark = pytest.mark.skipif(
    not (FOLDER / ".installed").exists(),
    reason=f"no compiler for GPUs in {FOLDER}: bash scripts/install_aot.sh {sys.executable} brings it",
)


@functools.cache
def compile_rows(kernel: str) -> list[Row]:
    return compile_kernels(FOLDER, kernels=[kernel])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_all_kernels_compile_and_none_spills(kernel: str) -> None:
    rows = compile_rows(kernel)
    assert {row["chip"] for row in rows} == set(CHIPS) == {"a100", "h100"}
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    assert any("ragged" in row["case"] for row in rows)
    assert [row for row in rows if row["outcome"] != "compiles"] == []
    assert find_differences(rows, read_capabilities("gpu")) == []


@pytest.mark.slow
def test_the_memory_of_an_attention_gradient_follows_the_length() -> None:
    sizes = {(row["chip"], row["case"]): row["temporary_bytes"] for row in compile_rows("attention")}
    for chip in CHIPS:
        short, long = (sizes[chip, f"length {length}"] for length in (4096, 8192))
        assert long < 2.1 * short
        assert long < 8192 * 8192  # a byte for every score of one of the four heads


def test_what_spills_and_what_is_refused_are_rows_with_their_reasons() -> None:
    """Tiles that are too large for the registers, and for the shared memory: that all cases compile is an answer."""
    script = """
import dataclasses, json
from hsai_kernels import aot_cases, aot_gpu
from hsai_kernels.ops.attention import gpu
device = aot_gpu.find_device("a100")
for rows, keys in ((64, 32), (256, 128)):
    tile = gpu.Tile(rows=rows, keys=keys, warps=4)
    gpu.TILES = {("float32", 256): {"forward": tile, "d_rows": tile, "d_keys": tile}}
    cases = (c for c in aot_cases.list_attention(dtypes=("float32",)) if c.name == "head dim 256")
    print(json.dumps(aot_gpu.compile_case(next(cases), "a100", device)))
"""
    environment = os.environ | {"PYTHONPATH": str(FOLDER), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    spilled, refused = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert spilled["outcome"] == "spills" and spilled["temporary_bytes"] is not None
    assert refused["outcome"] == "refused" and "Shared memory size limit exceeded" in refused["reason"]
    assert len(find_differences([spilled, refused], read_capabilities("gpu"))) == 4
