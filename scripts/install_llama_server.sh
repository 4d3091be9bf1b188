#!/usr/bin/env bash
# Builds llama.cpp's server for this processor, from the sources in PyPI's llama-cpp-python, for scripts/bench_serve.py:
#
#   bash scripts/install_llama_server.sh PYTHON FOLDER          FOLDER/llama-server is the program
#
# PYTHON has pip, cmake and ninja (the `dev` extra). 10 CPU minutes on two cores. Does nothing where it is in place.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: bash scripts/install_llama_server.sh PYTHON FOLDER" >&2; exit 2; }
python=$1 folder=$2
version=0.3.36
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
[ "$(cat "$folder/.installed" 2>/dev/null)" != "$version" ] || exit 0
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
mkdir -p "$folder"
log=$folder/install.log
echo "building llama-server of llama-cpp-python $version (log: $log)"
PATH=$(dirname "$python"):$PATH
{
  "$python" -m pip download --disable-pip-version-check -q --no-deps --no-binary llama-cpp-python \
    --dest "$build" "llama-cpp-python==$version"
  echo "$sha256  $build/llama_cpp_python-$version.tar.gz" | sha256sum --check
  tar -xzf "$build/llama_cpp_python-$version.tar.gz" -C "$build"
  cmake -S "$build/llama_cpp_python-$version/vendor/llama.cpp" -B "$build/made" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
    -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON
  cmake --build "$build/made" --target llama-server
  cp "$build/made/bin/llama-server" "$folder/llama-server"
} > "$log" 2>&1 || {
  tail -n 20 "$log" >&2
  echo "error: llama-server could not be built; all of it is in $log" >&2
  exit 2
}
echo "$version" > "$folder/.installed"
