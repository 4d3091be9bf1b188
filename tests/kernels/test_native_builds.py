"""The kernels built in other ways on this machine: with sanitizers, and by the other compiler without a warning."""

import dataclasses
import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.kernels import native_attention_cases, native_build, native_cases
from tests.kernels.native_build import run
from tests.needs import needs, require


def _has_sanitizers(tmp_path: Path, names: str = "address,undefined") -> bool:
    (tmp_path / "empty.cc").write_text("int main() {}\n")
    command = ["c++", f"-fsanitize={names}", "empty.cc", "-o", "empty"]
    return not native_build.list_missing("c++") and subprocess.run(command, cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """Every instruction set that this machine runs, at ragged sizes, in buffers of exactly their size."""
    present = not native_build.list_missing("cmake") and _has_sanitizers(tmp_path)
    require(present, "no cmake, or no compiler with the address and undefined behaviour sanitizers")
    names = native_build.list_runnable()
    options = ("-DHSAI_SANITIZE=ON", f"-DHSAI_INSTRUCTION_SETS={';'.join(names)}")
    driver = native_build.build("sanitized", ("native_driver",), *options) / "native_driver"
    cases = [*native_cases.list_cases(), *native_attention_cases.list_cases()]
    native_cases.write_cases(tmp_path / "cases", cases)
    for name in names:
        run(driver, tmp_path / "cases", tmp_path / "results", name)
        native_cases.check_results(tmp_path / "results", cases)
    # That it would find something: a weight that is a row shorter than its header says, or such keys of each cache.
    for case in {(case.kind, case.header[0]): case for case in cases}.values():
        short = dataclasses.replace(case, arrays=(case.arrays[0], case.arrays[1][:-1], *case.arrays[2:]))
        native_cases.write_cases(tmp_path / "cases", [short])
        with pytest.raises(AssertionError, match="heap-buffer-overflow"):
            run(driver, tmp_path / "cases", tmp_path / "results")


def test_threads_share_tiles_without_a_race(tmp_path):
    """Under the thread sanitizer, which reports a race even where it did no harm; the program counts faults."""
    require(_has_sanitizers(tmp_path, "thread"), "no compiler with the thread sanitizer")
    sources = native_build.ROOT / "kernels" / "csrc"
    program = tmp_path / "threads_stress"
    files = (Path(__file__).with_name("threads_stress.cc"), sources / "threads.cc")
    run("c++", "-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{sources}", *files, "-o", program)
    assert run(program) == "0 faults\n"


@needs(not native_build.list_missing("clang++", "cmake"), "no clang++, or no cmake: GCC builds the library")
@pytest.mark.parametrize("processor", ["x86_64", "aarch64"])
def test_clang_has_no_warning(processor):
    """All sources with all flags, ffi.cc and the driver among them; GCC's turn is the build of the library in CI."""
    options = ("-DCMAKE_CXX_COMPILER=clang++", "-DHSAI_WERROR=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    if processor != native_build.PROCESSOR:
        found = not native_build.list_missing(f"{processor}-linux-gnu-g++")
        require(found, f"no headers and libraries for {processor}: bash scripts/install_cross.sh brings ARM's")
        options += (f"-DCMAKE_CXX_COMPILER_TARGET={processor}-linux-gnu", f"-DCMAKE_SYSTEM_PROCESSOR={processor}")
        options += ("-DCMAKE_SYSTEM_NAME=Linux",)
    folder = native_build.build(f"clang-{processor}", ("help",), *options)
    commands = json.loads((folder / "compile_commands.json").read_text())
    assert len(commands) >= 4 + len(native_build.INSTRUCTION_SETS[processor])
    for command in commands:
        run(*shlex.split(command["command"]), "-fsyntax-only")
