#!/usr/bin/env bash
# Brings the compilers of accelerators that are not here into .aot/, beside the virtual environment and never in it
# (a libtpu that jax finds there changes how it starts for everybody). Does nothing where all is in place already.
#
#   bash scripts/install_aot.sh PYTHON          PYTHON: the interpreter of the environment that has jax
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$1
tag=$("$python" -c 'import sys; print(sys.implementation.cache_tag)')

# install NAME: puts the packages that pins.py lists, without what they depend on, into .aot/NAME unless just those are
# there.
install() {
  local folder=.aot/$1 pins wanted
  pins=$("$python" kernels/hsai_kernels/aot/pins.py "$1")
  wanted="$tag "$(echo $pins)
  if [ "$(cat "$folder/.installed" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  echo "installing "$pins" into $folder"
  rm -rf "$folder"
  "$python" -m pip install --disable-pip-version-check --progress-bar off --quiet --root-user-action ignore \
    --no-deps --target "$folder" $pins
  echo "$wanted" > "$folder/.installed"
}

install tpu  # about 150 MB
install gpu  # about 600 MB
