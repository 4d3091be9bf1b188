#!/usr/bin/env bash
# Takes `--python PATH` from the front of the caller's arguments into $python, then goes to the repository's root.
# Sourced, without arguments, by the scripts that make a virtual environment.

python=python3
if [ "${1:-}" = --python ]; then
  [ $# -ge 2 ] || { echo "error: --python needs a path" >&2; exit 2; }
  python=$2
  shift 2
fi
command -v "$python" > /dev/null || { echo "error: there is no Python at $python; --python PATH picks one" >&2; exit 2; }
# A path is meant from where the caller stands. (It must not be resolved: the python of a virtual environment is a link.)
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || {
  echo "error: $python is $("$python" --version 2>&1 | head -n 1); hsai needs Python 3.11 or later" >&2
  exit 2
}
