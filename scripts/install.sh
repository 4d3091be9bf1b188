#!/usr/bin/env bash
# Makes a virtual environment and installs hsai into it, or reuses the one that is there. Sourced by the other scripts:
#
#   source scripts/install.sh VENV [PYTHON] [EXTRAS]
#
# Afterwards VENV/bin is first on the PATH. What decides an install (the interpreter, pyproject.toml, the C++ sources) is
# kept beside it; when that changes, it is done again.

venv=$1 python=${2:-python3} extras=${3:-}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $python is $("$python" --version 2>&1); hsai needs Python 3.11 or later (--python PATH picks another)" >&2
  exit 2
}
wanted="$("$python" -c 'import sys; print(sys.version, sys.prefix)') [$extras] $(cat pyproject.toml CMakeLists.txt \
  $(find kernels/csrc -type f | sort) | sha256sum)"
if [ "$(cat "$venv/.installed" 2>/dev/null)" = "$wanted" ]; then
  echo "reusing $venv"
else
  echo "installing into $venv"
  "$python" -m venv --clear "$venv" || {
    echo "error: $python cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2
    exit 2
  }
  log=$venv/install.log
  # A line that is drawn over and over, from pip's long log; the whole log stays in the file.
  { "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off -e ".$extras" 2>&1 || echo "pip failed"; } |
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
  echo "$wanted" > "$venv/.installed"
fi
PATH=$PWD/$venv/bin:$PATH
