"""The kernels of other machines: ARM's cross-compiled and run by qemu, AVX-VNNI's in an encoding that AVX-512 runs."""

import dataclasses
from pathlib import Path

import pytest

from tests.kernels import native_attention_cases, native_build, native_cases
from tests.kernels.native_build import SOURCES, run
from tests.needs import needs, require

COMPILER = "aarch64-linux-gnu-g++"
TOOLS = native_build.list_missing(COMPILER, "qemu-aarch64", "cmake")
needs_cross = needs(not TOOLS, f"no {', '.join(TOOLS)}: bash scripts/install_cross.sh brings them")

# The instruction set that each must choose: the first has no dotprod, the second no i8mm.
PROCESSORS = {"cortex-a53": "baseline", "neoverse-n1": "dotprod", "max": "i8mm"}
SETS = native_build.INSTRUCTION_SETS["aarch64"]


@pytest.fixture(scope="module")
def cases() -> list[native_cases.Case]:
    return [*native_cases.list_cases(), *native_attention_cases.list_cases()]


@pytest.fixture(scope="module")
def driver() -> Path:
    """The driver for ARM; the whole library is compiled and linked beside it."""
    folder = native_build.build(
        "aarch64",
        ("native_driver", "_native"),
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={COMPILER}",
    )
    return folder / "native_driver"


def emulate(processor: str, driver: Path) -> tuple[object, ...]:
    return ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", processor, driver)


@needs_cross
@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
def test_arm_kernels_match_the_oracle(processor, driver, cases, tmp_path):
    """Each instruction set on the plainest processor that chooses it; those that are beyond that one are refused."""
    command = emulate(processor, driver)
    assert run(*command).strip() == PROCESSORS[processor]
    native_cases.write_cases(tmp_path / "cases", cases)
    run(*command, tmp_path / "cases", tmp_path / "results")
    native_cases.check_results(tmp_path / "results", cases)
    native_cases.write_cases(tmp_path / "none", [])
    best = SETS.index(PROCESSORS[processor])
    for name in SETS[: best + 1]:
        run(*command, tmp_path / "none", tmp_path / "results", name)
    for name in SETS[best + 1 :]:
        with pytest.raises(AssertionError, match="gave 3"):
            run(*command, tmp_path / "none", tmp_path / "results", name)


@needs_cross
@pytest.mark.slow
def test_reading_behind_an_array_ends_the_driver(driver, cases, tmp_path):
    """What the tests above rely on to find it: a weight that is a row shorter than its header says, or such keys."""
    for case in (cases[0], cases[-1]):
        short = (case.arrays[0], case.arrays[1][:-1], *case.arrays[2:])
        native_cases.write_cases(tmp_path / "cases", [dataclasses.replace(case, arrays=short)])
        with pytest.raises(AssertionError, match="gave -?(11|139)"):
            run(*emulate("max", driver), tmp_path / "cases", tmp_path / "results")


FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=fast", "-O3")


def _compile_avxvnni(folder: Path, compiler: str) -> Path:
    """The driver with nothing but the AVX-VNNI kernels, as its baseline, in AVX-512VL's encoding of one instruction.

    Few machines have AVX-VNNI, and qemu 7.2 does not emulate it; more have AVX-512, whose 256-bit vpdpbusd is the same.
    All but the encoding is what the compiler made of the sources for AVX-VNNI: the change is made in its assembly.
    """
    table = ("-DHSAI_PRODUCTS=kBaselineProducts", '-DHSAI_PRODUCTS_NAME="avxvnni"')
    vector = ("-mavx2", "-mfma", "-mavxvnni")
    run(compiler, *FLAGS, *vector, *table, "-S", SOURCES / "products.cc", "-o", folder / "products.s")
    text = (folder / "products.s").read_text()
    assert "zmm" not in text and text.count("{vex} vpdpbusd") == text.count("vpdpbusd\t") > 0
    (folder / "evex.s").write_text(text.replace("{vex} vpdpbusd", "vpdpbusd"))
    names = ("attention", "multiply", "plan", "select", "threads", "native_driver")
    sources = [SOURCES / f"{name}.cc" for name in names]
    run(compiler, *FLAGS, *sources, folder / "evex.s", "-pthread", "-o", folder / "driver")
    return folder / "driver"


@pytest.mark.slow
@pytest.mark.skipif(native_build.PROCESSOR != "x86_64", reason="AVX-VNNI is x86's")
def test_avxvnni_kernels_match_the_oracle(cases, tmp_path):
    runnable = native_build.list_runnable()
    if "avxvnni" in runnable:
        pytest.skip("this machine has AVX-VNNI: test_native.py tests it")
    if "avx512" not in runnable:
        pytest.skip("this machine has no AVX-512")
    compiler = native_build.find_tool("g++")
    require(compiler is not None, "no g++")
    with native_build.open_folder("avxvnni") as folder:
        driver = _compile_avxvnni(folder, compiler)
        native_cases.write_cases(tmp_path / "cases", cases)
        assert run(driver).strip() == "avxvnni"
        run(driver, tmp_path / "cases", tmp_path / "results")
    native_cases.check_results(tmp_path / "results", cases)
