"""Kernels compile for chips by the chips' real compilers, with no device present, and as the stored table says.

Compiled here are the quick cases (small, ragged, decoding) of every API: for A100 and H100 by XLA's CUDA compiler, none
of which spills registers with its own tile, and for TPU v5e and 7x, the smallest and the newest, by XLA:TPU and Mosaic.
The table of all cases for all chips is what scripts/write_capabilities.py compiled; test_programs.py holds each of its
tiles against the kernels as they are now.
"""

import sys
from pathlib import Path

import pytest

from hsai_kernels.aot.gpu_cases import LARGER
from hsai_kernels.aot.runner import TARGETS, compile_kernels, run_apart
from hsai_kernels.capabilities import CHIPS, find_differences, read_capabilities
from tests.needs import needs

FOLDER = Path(__file__).resolve().parents[2] / ".aot"
GPU, TPU = TARGETS["gpu"], TARGETS["tpu"]
needs_gpu, needs_tpu = (
    needs(
        (FOLDER / platform / ".installed").exists(),
        f"no compiler in {FOLDER / platform}: bash scripts/install_aot.sh {sys.executable} brings it",
    )
    for platform in ("gpu", "tpu")
)


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize("api", GPU.kernels)
def test_gpu_kernels_compile_and_none_spills(api: str) -> None:
    rows = compile_kernels("gpu", FOLDER / "gpu", kernels=[api], quick=True)
    assert {row["chip"] for row in rows} == set(GPU.chips) == {"a100", "h100"}
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    assert [row for row in rows if row["outcome"] != "compiles"] == []
    assert find_differences(rows, read_capabilities("gpu")) == []


def test_every_kernel_has_a_quick_case_and_no_stored_program_spills() -> None:
    for target in (GPU, TPU):
        every, quick = (
            {(case.kernel, case.dtype) for case in target.list_cases(target.kernels, quick=quick)}
            for quick in (False, True)
        )
        assert every - quick <= {("attention gradient", "bfloat16")}  # a program of those that it is made of
        own = [row for row in read_capabilities(target.platform) if LARGER not in row["case"]]
        assert [row for row in own if row["outcome"] != "compiles"] == []
    assert any(LARGER in row["case"] for row in read_capabilities("gpu"))


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "tpu7x"])
def test_tpu_kernels_compile(chip: str) -> None:
    rows = compile_kernels("tpu", FOLDER / "tpu", [chip], quick=True)
    assert len(rows) == sum(1 for _ in TPU.list_cases(TPU.kernels, quick=True))
    assert [row for row in rows if row["outcome"] != "compiles"] == []
    assert find_differences(rows, read_capabilities("tpu")) == []


LENGTHS_ON_GPUS = """
import json
from hsai_kernels.aot.runner import TARGETS, compile_case
target = TARGETS["gpu"]
for case in target.list_cases(["attention"], quick=False):
    if case.kernel == "attention gradient":
        for chip in target.chips:
            print(json.dumps(compile_case(target, case, chip, target.find_device(chip))))
"""


@needs_gpu
def test_the_memory_of_an_attention_gradient_follows_the_length() -> None:
    rows = run_apart(GPU, FOLDER / "gpu", ["-c", LENGTHS_ON_GPUS])
    assert find_differences(rows, read_capabilities("gpu")) == []
    sizes = {(row["chip"], row["case"]): row["temporary_bytes"] for row in rows}
    for chip in GPU.chips:
        short, long = (sizes[chip, f"length {length}"] for length in (4096, 8192))
        assert long < 2.1 * short
        assert long < 8192 * 8192  # a byte for every score of one of the four heads


LENGTHS = """
import dataclasses, json, jax
from hsai_kernels.aot.runner import TARGETS, compile_case
target = TARGETS["tpu"]
cases = target.list_cases(["attention"], quick=False)
case = next(c for c in cases if (c.kernel, c.name, c.dtype) == ("attention backward", "head dim 64", "bfloat16"))
for length in (32768, 65536):
    stretch = lambda x: jax.ShapeDtypeStruct((x.shape[0], length, *x.shape[2:]), x.dtype)
    longer = dataclasses.replace(case, operands=jax.tree.map(stretch, case.operands))
    print(json.dumps(compile_case(target, longer, "v5e", target.find_device("v5e"))))
"""


@needs_tpu
def test_the_memory_of_an_attention_gradient_follows_the_length_on_a_tpu() -> None:
    """Of shorter ones XLA finds room in fast memory for all that it keeps: there is nothing to measure."""
    short, long = (row["temporary_bytes"] for row in run_apart(TPU, FOLDER / "tpu", ["-c", LENGTHS]))
    hidden = 128 << 20  # bytes of fast memory, which are not counted
    assert short > 0
    assert long + hidden < 2.1 * (short + hidden)
    assert long < 2 * 4 * 65536 * 65536 // 32  # a bit for every fourth score of two rows and four heads


# Tiles other than the kernels' own, by `use_tiles`: that all cases compile is an answer, and not a constant.
OTHER_TILE = """
import json
from hsai_kernels.aot.runner import TARGETS, compile_case
from hsai_kernels.tuning import use_tiles
target = TARGETS[{platform!r}]
cases = target.list_cases(["attention"], quick=False)
case = next(c for c in cases if c.dtype == "float32" and c.kernel == "attention forward" and c.name == {name!r})
for tile in {tiles!r}:
    with use_tiles({{("attention forward", "float32", {shape!r}): tile}}):
        print(json.dumps(compile_case(target, case, {chip!r}, target.find_device({chip!r}))))
"""


@needs_gpu
def test_what_spills_and_what_is_refused_are_rows_with_their_reasons() -> None:
    """Too large for the registers, and for the shared memory."""
    tiles = [{"rows": rows, "keys": keys, "warps": 4, "stages": 2} for rows, keys in ((64, 32), (256, 128))]
    options = {"platform": "gpu", "chip": "a100", "name": "head dim 256", "shape": "head dim 256", "tiles": tiles}
    spilled, refused = run_apart(GPU, FOLDER / "gpu", ["-c", OTHER_TILE.format(**options)])
    assert spilled["outcome"] == "spills" and spilled["temporary_bytes"] is not None
    assert refused["outcome"] == "refused" and "Shared memory size limit exceeded" in refused["reason"]
    assert [spilled["tile"], refused["tile"]] == tiles
    assert len(find_differences([spilled, refused], read_capabilities("gpu"))) == 4


@needs_tpu
def test_what_mosaic_refuses_is_a_row_with_its_reason() -> None:
    """More fast memory than a kernel may use."""
    tiles = [{"rows": 256, "keys": 128}]
    options = {"platform": "tpu", "chip": "v5e", "shape": "head dim 128", "tiles": tiles}
    options["name"] = "ragged, head dim 80, window, softcap, segments"
    less_memory = "from hsai_kernels.ops.attention import tpu_blocks; tpu_blocks.MEMORY_LIMIT = 2**17\n"
    (row,) = run_apart(TPU, FOLDER / "tpu", ["-c", less_memory + OTHER_TILE.format(**options)])
    assert row["outcome"] == "refused" and "vmem" in row["reason"].lower()
    assert len(find_differences([row], read_capabilities("tpu"))) == 1


@pytest.mark.parametrize("platform", [pytest.param("gpu", marks=needs_gpu), pytest.param("tpu", marks=needs_tpu)])
def test_jax_names_every_chip_as_the_table_expects(platform: str) -> None:
    script = (
        "import json; from hsai_kernels.aot.runner import TARGETS; from hsai_kernels.capabilities import name_chip;"
        f"target = TARGETS[{platform!r}];"
        "print(json.dumps({chip: name_chip(target.find_device(chip).device_kind) for chip in target.chips}))"
    )
    (found,) = run_apart(TARGETS[platform], FOLDER / platform, ["-c", script])
    assert found == {chip: chip for chip in TARGETS[platform].chips}
    assert set(found) <= set(CHIPS)
