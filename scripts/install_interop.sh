#!/usr/bin/env bash
# Installs llama.cpp's Python package, which judges the GGUF files that hsai reads and writes, into the virtual
# environment of PYTHON:
#
#   bash scripts/install_interop.sh PYTHON
#
# It is compiled from its source (PyPI has no wheel): 3 CPU minutes on two cores. All that its tests do not run is left
# out of the build: llama.cpp's common library, which the package switches on by itself and which takes most of the
# time, the tools, the server, image models. Only ggml's kernels, which are C, are optimized in full.
set -euo pipefail
python=$1
version=0.3.36
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
if "$python" -c "import llama_cpp, sys; sys.exit(llama_cpp.__version__ != '$version')" 2>/dev/null; then
  exit 0
fi
echo "installing llama-cpp-python $version (log: $(dirname "$python")/../install_interop.log)"
log=$(dirname "$python")/../install_interop.log
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
{
  "$python" -m pip download --disable-pip-version-check -q --no-deps --no-binary llama-cpp-python \
    --dest "$build" "llama-cpp-python==$version"
  echo "$sha256  $build/llama_cpp_python-$version.tar.gz" | sha256sum --check
  tar -xzf "$build/llama_cpp_python-$version.tar.gz" -C "$build"
  sed -i 's/set(LLAMA_BUILD_COMMON ON /set(LLAMA_BUILD_COMMON OFF /' "$build/llama_cpp_python-$version/CMakeLists.txt"
  CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_OPENSSL=OFF -DGGML_OPENMP=OFF \
    -DCMAKE_CXX_FLAGS_RELEASE=-O1" \
    "$python" -m pip install --disable-pip-version-check --progress-bar off "$build/llama_cpp_python-$version"
} > "$log" 2>&1 || {
  tail -n 20 "$log" >&2
  echo "error: llama-cpp-python could not be installed; all of it is in $log" >&2
  exit 2
}
