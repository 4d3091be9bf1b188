"""Installation where there is no C++ compiler, and the scripts' own arguments."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["", "/nonexistent/c++"], ids=["compiler", "no compiler"])
def test_a_wheel_is_made_with_and_without_a_compiler(compiler: str, tmp_path: Path) -> None:
    """Without one it is pure Python: what is lost is then told by tests/kernels/test_dispatch.py's warning."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "tests", "__pycache__", "*.so"))
    # One instruction set shows that the library gets into the wheel; the install under test compiled all of them.
    environment = {**os.environ, "SKBUILD_CMAKE_DEFINE": "HSAI_INSTRUCTION_SETS=baseline"}
    environment |= {"CXX": compiler} if compiler else {}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"hsai/cli/__init__.py", "hsai_kernels/native.py"} <= set(names)
    assert ("hsai_kernels/_native.so" in names) == (not compiler)
    assert wheel.name.endswith("-py3-none-any.whl") == bool(compiler)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test.sh", "--python", "./nope"], "there is no Python at ./nope"),
        (["test.sh", "--python"], "--python needs a path"),
        (["quickstart.sh", "--python", "./nope"], "there is no Python at ./nope"),
        (["quickstart.sh", "--pyton"], "unknown option --pyton; valid: --python PATH"),
    ],
)
def test_arguments_that_cannot_be(words: list[str], message: str, tmp_path: Path) -> None:
    script, *rest = words
    command = ["bash", ROOT / "scripts" / script, *rest]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_a_path_is_meant_from_where_the_caller_stands(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    script = f"source {ROOT}/scripts/python.sh --python ./python rest; echo $python; pwd"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stdout.splitlines() == [str(tmp_path / "python"), str(ROOT)], done.stderr
