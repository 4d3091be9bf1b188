#!/usr/bin/env bash
# All that must be green: format, lint, types, tests. Installs what it needs into a virtual environment of its own, and
# the compilers of absent accelerators beside it (.aot; without them the tests that compile for chips are skipped), and
# as root on Debian those for ARM, and clang (install_cross.sh), a browser for the chat page (install_browser.sh), and
# llama.cpp, which judges GGUF files (install_interop.sh).
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
[ $kernels = built ] || {
  grep -E -A 8 "error( |:)|warning:|FAILED" "$venv/install.log" | head -n 40 >&2
  echo "error: the CPU kernels, which hundreds of tests run, were not built; all of it is in $venv/install.log" >&2
  exit 2
}
# llama.cpp compiles while the others are brought over the network.
bash scripts/install_interop.sh "$venv/bin/python" &
interop=$!
bash scripts/install_aot.sh "$venv/bin/python"
bash scripts/install_cross.sh
bash scripts/install_browser.sh
wait $interop
if [ $# -gt 0 ]; then
  exec pytest "$@"
fi
ruff format --check .
ruff check .
mypy
# A test that hangs costs its worker, and is named, where it would have cost the run.
together="-n 2 --dist worksteal --timeout 900 --timeout-method thread"
# XLA compiles for tests in haste. What says that texts are the same to the last bit has to hold of what users run, and is
# compiled as they do.
exact="tests/infer/test_service.py tests/infer/test_speculation.py tests/models/test_cache.py tests/models/test_paged.py"
pytest $together --durations 25 $(printf -- "--ignore %s " $exact)
HSAI_TEST_COMPILER=optimizing exec pytest $together $exact
