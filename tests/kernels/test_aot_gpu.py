"""Every GPU kernel compiles for an A100 and an H100, without spilling registers; no GPU is needed.

Needs .aot/gpu, which `bash scripts/install_aot.sh` brings.
"""

import pathlib

import pytest

from hsai_kernels.aot_cases import KERNELS
from hsai_kernels.aot_gpu import CHIPS, Row, compile_kernels

FOLDER = pathlib.Path(__file__).parents[2] / ".aot" / "gpu"
if not (FOLDER / ".installed").exists():
    pytest.skip(f"{FOLDER} is not there: bash scripts/install_aot.sh brings it", allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=KERNELS)
def rows(request: pytest.FixtureRequest) -> list[Row]:
    return compile_kernels(FOLDER, kernels=[request.param])


def test_all_kernels_compile_and_none_spills(rows: list[Row]) -> None:
    assert {row["chip"] for row in rows} == set(CHIPS) == {"a100", "h100"}
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    assert any("ragged" in row["case"] for row in rows)
    assert [row for row in rows if row["outcome"] != "compiles"] == []


def test_the_memory_of_an_attention_gradient_follows_the_length(rows: list[Row]) -> None:
    sizes = {(row["chip"], row["case"]): row["temporary_bytes"] for row in rows if "gradient" in row["kernel"]}
    if not sizes:
        pytest.skip("these are not attention's rows")
    for chip in CHIPS:
        short, long = (sizes[chip, f"length {length}"] for length in (4096, 8192))
        assert long < 2.1 * short
        assert long < 8192 * 8192  # a byte for every score of one of the four heads
