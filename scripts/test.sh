#!/usr/bin/env bash
# All that must be green: format, lint, types, tests. Installs what it needs into a virtual environment of its own, and
# the compilers of absent accelerators beside it (.aot; without them the tests that compile for chips are skipped), and
# as root on Debian those for ARM (install_cross.sh) and a browser for the chat page (install_browser.sh), and llama.cpp,
# which judges GGUF files (install_interop.sh).
#
#   bash scripts/test.sh [--python PATH] [PYTEST ARGUMENTS ...]
#
# With arguments for pytest only those tests run, without lint and types: bash scripts/test.sh tests/formats -k int4
set -euo pipefail
venv=.venv
[ "${1:-}" != --python ] || venv=.venv-VERSION
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
venv=${venv/VERSION/$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
source scripts/install.sh "$venv" "$python" "[dev,interop]"
bash scripts/install_interop.sh "$venv/bin/python"
bash scripts/install_aot.sh "$venv/bin/python"
bash scripts/install_cross.sh
bash scripts/install_browser.sh
if [ $# -gt 0 ]; then
  exec pytest "$@"
fi
ruff format --check .
ruff check .
mypy
exec pytest -n 2 --dist worksteal --durations 12
