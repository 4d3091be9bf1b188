#!/usr/bin/env bash
# Makes a virtual environment and installs hsai into it, or reuses the one that is there. Sourced by the other scripts:
#
#   source scripts/install.sh VENV PYTHON [EXTRAS]
#
# Afterwards VENV/bin is first on the PATH. What decides an install (interpreter, place, compiler, pyproject.toml, C++ sources)
# is kept beside it; when that changes, it is done again.

venv=$1 python=$2 extras=${3:-}

compiler=$(command -v "${CXX:-c++}" || command -v g++ || command -v clang++ || echo "no C++ compiler")
wanted="$("$python" -c 'import sys; print(sys.version, sys.prefix)') $PWD $compiler $(cat pyproject.toml CMakeLists.txt \
  $(find kernels/csrc -type f | sort) | sha256sum)"
found=$(cat "$venv/.installed" 2>/dev/null || true)
if [ "$found" = "$wanted $extras" ] || [ "$found" = "$wanted [dev,interop]" ]; then  # with these there is everything
  echo "reusing $venv"
else
  echo "installing into $venv"
  "$python" -m venv --clear "$venv" || {
    echo "error: $python cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2
    exit 2
  }
  log=$venv/install.log
  # A line that is drawn over and over, from pip's long log; the whole log stays in the file, with what the compiler says.
  { "$venv/bin/python" -m pip install --verbose --disable-pip-version-check --progress-bar off -e ".$extras" 2>&1 || echo "pip failed"; } |
    tee "$log" | awk -v tty="$([ -t 1 ] && echo 1)" '
      /^ *Collecting /  { n++; line = sprintf("  %3d packages found: %s", n, $2) }
      /^Building|Preparing editable/ { line = "  compiling the CPU kernels" }
      /^Installing /    { line = "  unpacking " n " packages" }
      line != last && (tty || !/Collecting/) { printf tty ? "\r\033[K%s" : "%s\n", line; fflush(); last = line }
      END { if (tty) print "" }'
  if grep -q "^pip failed" "$log"; then
    tail -n 20 "$log" >&2
    echo "error: the installation failed; all of it is in $log" >&2
    exit 2
  fi
  echo "$wanted $extras" > "$venv/.installed"
fi
# For the caller, too: `built` or `missing`.
kernels=$("$venv/bin/python" -c 'from importlib.util import find_spec
print("built" if find_spec("hsai_kernels._native") else "missing")')
[ $kernels = built ] || echo "warning: the CPU kernels were not built ($venv/install.log says why): low-bit decoding will be" \
  "many times slower; with a C++17 compiler on the PATH, run this again"
PATH=$PWD/$venv/bin:$PATH
