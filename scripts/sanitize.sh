#!/usr/bin/env bash
# Runs the tests of the native kernels against a build with the address and undefined behaviour sanitizers, FFI handlers
# included. It takes minutes: for a change of kernels/csrc. CI has test_native_builds.py, which runs the kernels alone.
#
#   bash scripts/sanitize.sh [PYTEST ARGUMENTS ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
source scripts/install.sh .venv "$python" "[dev,interop]"

folder=build/tests/sanitized-library
cmake -S . -B "$folder" -DCMAKE_BUILD_TYPE=Release -DHSAI_SANITIZE=ON -DPython_EXECUTABLE="$PWD/.venv/bin/python" > /dev/null
cmake --build "$folder" --target _native

# The sanitizers must be loaded before Python is. It and jax never free all that they take: that is not looked at.
export HSAI_SANITIZED=$PWD/$folder/_native.so ASAN_OPTIONS=detect_leaks=0
preload="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libubsan.so)"
LD_PRELOAD=$preload exec .venv/bin/python - "$@" <<'END'
import os
import re
import sys
from pathlib import Path

import pytest

from hsai_kernels import native

native.find_library = lambda: os.environ["HSAI_SANITIZED"]
# All but those of what has no native part and of builds of their own, so that a file which is new is among them.
others = "aot|builds|caches|capabilities|chunked|costs|cross|gated_mlp|gpu|interpret|norm_matmul|rope|tpu|tuning"
tests = sorted(str(path) for path in Path("tests/kernels").glob("test_*.py") if not re.search(others, path.name))
sys.exit(pytest.main([*tests, *sys.argv[1:]]))
END
