"""Every TPU kernel compiles for v5e, v5p, v6e and 7x, by the real XLA:TPU and Mosaic, with no device present.

Here the small cases, ragged ones among them, for every chip; the large ones too are in the table that
scripts/write_capabilities.py writes, and what was compiled here must agree with it.
"""

import sys
from pathlib import Path

import pytest

from hsai_kernels import aot_tpu, capabilities
from hsai_kernels.aot_tpu_cases import KERNELS, list_cases

FOLDER = Path(__file__).resolve().parents[2] / ".aot" / "tpu"
needs_compiler = pytest.mark.skipif(
    not FOLDER.is_dir(),
    reason=f"no compiler for TPUs in {FOLDER}: bash scripts/install_aot.sh {sys.executable} brings it",
)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("chip", aot_tpu.CHIPS)
def test_every_kernel_compiles(chip):
    rows = aot_tpu.compile_kernels(FOLDER, [chip], quick=True)
    assert len(rows) == sum(1 for kernel in KERNELS for _ in list_cases(kernel, quick=True))
    refused = [row for row in rows if row["outcome"] != "compiles"]
    assert not refused
    assert capabilities.find_differences(rows, capabilities.read_capabilities("tpu")) == []


@needs_compiler
def test_what_the_compiler_refuses_is_a_row_with_its_reason():
    """More fast memory than a kernel may use: that all cases compile is an answer, and not a constant."""
    script = (
        "import json; from hsai_kernels import aot_tpu, aot_tpu_cases;"
        "from hsai_kernels.ops.attention import tpu_blocks;"
        "tpu_blocks.MEMORY_LIMIT = 2**17; case = next(aot_tpu_cases.list_cases('attention', quick=True));"
        "print(json.dumps(aot_tpu.compile_case(case, 'v5e', aot_tpu.find_device('v5e'))))"
    )
    (row,) = aot_tpu.run_apart(FOLDER, ["-c", script])
    assert row["outcome"] == "refused"
    assert "vmem" in row["reason"].lower()
    assert len(capabilities.find_differences([row], capabilities.read_capabilities("tpu"))) == 1
