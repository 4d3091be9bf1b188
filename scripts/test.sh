#!/usr/bin/env bash
# All that must be green: format, lint, types, tests. Installs what it needs into a virtual environment of its own.
#
#   bash scripts/test.sh [--python PATH] [PYTEST ARGUMENTS ...]
#
# With arguments for pytest only those tests run, without lint and types: bash scripts/test.sh tests/formats -k int4
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3 venv=.venv
if [ "${1:-}" = --python ]; then
  python=${2:?--python needs a path}
  venv=.venv-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  shift 2
fi
source scripts/install.sh "$venv" "$python" "[dev]"
if [ $# -gt 0 ]; then
  exec pytest "$@"
fi
ruff format --check .
ruff check .
mypy
exec pytest -n 2 --dist worksteal
