"""Builds kernels/csrc with CMake for tests, each way in a folder of its own that later runs reuse."""

import contextlib
import fcntl
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hsai_kernels import native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels" / "csrc"

INSTRUCTION_SETS = {
    "x86_64": ("baseline", "avx2", "avxvnni", "avx512"),
    "aarch64": ("baseline", "dotprod", "i8mm"),
}
"""By processor, slowest first, as in select.cc; all have the first."""


PROCESSOR = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
"""That of this machine, by its name above."""


def list_missing(*tools: str) -> list[str]:
    """Those of the command-line tools that are not here."""
    return [tool for tool in tools if find_tool(tool) is None]


def find_tool(name: str) -> str | None:
    """Path of a command; also of one that pip put beside the interpreter."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def list_runnable() -> list[str]:
    """Those of INSTRUCTION_SETS that the installed library can use on this machine."""
    fastest = native.name_instruction_set()
    runnable = []
    for name in INSTRUCTION_SETS.get(PROCESSOR, ("baseline",)):
        with contextlib.suppress(ValueError):
            native.use_instruction_set(name)
            runnable.append(name)
    native.use_instruction_set(fastest)
    return runnable


@contextlib.contextmanager
def open_folder(name: str) -> Iterator[Path]:
    """The folder of one build, for this process alone: tests may run in several."""
    folder = ROOT / "build" / "tests" / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def run(*command: object, **options: object) -> str:
    """What a command prints; an AssertionError with all of it, and the errors, if the command fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, (
        f"{' '.join(words)} gave {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-8000:]}"
    )
    return done.stdout


def build(name: str, targets: Sequence[str], *options: str) -> Path:
    """The folder `build/tests/name` with these CMake targets built there; no warning of the compiler is accepted."""
    with open_folder(name) as folder:
        cmake = find_tool("cmake")
        common = ("-DCMAKE_BUILD_TYPE=Release", "-DHSAI_WERROR=ON", f"-DPython_EXECUTABLE={sys.executable}")
        ninja = find_tool("ninja")
        generator = () if ninja is None else ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}")
        run(cmake, "-S", ROOT, "-B", folder, *generator, *common, *options)
        # One compiler at a time: pytest runs in several processes already.
        run(cmake, "--build", folder, "--parallel", 1, "--target", *targets)
    return folder
