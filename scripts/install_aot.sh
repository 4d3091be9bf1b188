#!/usr/bin/env bash
# Brings the compilers of accelerators that are not here into .aot/, beside the virtual environment and never in it
# (a libtpu that jax finds there changes how it starts for everybody). Does nothing where all is in place already.
#
#   bash scripts/install_aot.sh PYTHON          PYTHON: the interpreter of the environment that has jax
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$1
tag=$("$python" -c 'import sys; print(sys.implementation.cache_tag)')

# install NAME REQUIREMENT...: puts packages, without what they depend on, into .aot/NAME unless just those are there.
install() {
  local folder=.aot/$1 wanted="$tag ${*:2}"
  if [ "$(cat "$folder/.installed" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  echo "installing ${*:2} into $folder"
  rm -rf "$folder"
  "$python" -m pip install --disable-pip-version-check --progress-bar off --quiet --root-user-action ignore \
    --no-deps --target "$folder" "${@:2}"
  echo "$wanted" > "$folder/.installed"
}

# TPU: the libtpu (XLA:TPU and Mosaic) that this jax was released with, about 150 MB.
install tpu "$("$python" -c '
import importlib.metadata
pins = [line for line in importlib.metadata.requires("jax") if line.startswith("libtpu") and "tpu" in line]
print(pins[0].split(";")[0].strip())')"

# GPU: XLA's CUDA compiler of this jaxlib and NVIDIA's assembler, about 600 MB; the libraries that run programs are not
# needed.
version=$("$python" -c 'import importlib.metadata as m; print(m.version("jaxlib"))')
install gpu "jax-cuda12-plugin==$version" "jax-cuda12-pjrt==$version" "nvidia-cuda-nvcc-cu12==12.9.86"
