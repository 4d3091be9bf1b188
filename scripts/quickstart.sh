#!/usr/bin/env bash
# From nothing to a table: learns Python from this machine's standard library, makes the model sparse and low-bit,
# exports it, runs every bundle in a process of its own, and compares them. About five minutes on two cores; a second run
# goes on where the first one stopped. Everything is in .venv and runs/.
#
#   bash scripts/quickstart.sh [--python PATH]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
[ $# -eq 0 ] || { echo "error: unknown option $1; valid: --python PATH" >&2; exit 2; }
step() { printf '\n== %s\n' "$*"; }

step "1/6 install"
source scripts/install.sh .venv "$python"
# Each step takes its memory anew: in pages of 4 KiB, a fifth of a training step on a CPU is spent on page faults.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$PWD/.venv/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5

run=runs/quickstart
formats="bf16 int8 int4 nm24 nm24_int4"

step "2/6 train a decoder of 5M parameters, sharded over 2 devices (data x model)"
hsai train configs/quickstart.py

step "3/6 compress"
# shellcheck disable=SC2086
hsai compress $run --recipe $(printf 'configs/compress/%s.py ' $formats) --out $run/compressed --reuse --overwrite

step "4/6 export: weights, tokenizer, StableHLO graphs"
# shellcheck disable=SC2086
hsai export $(printf "$run/compressed/%s " $formats) --out $run/bundles --reuse --overwrite

step "5/6 generate: each bundle's graphs in a new process, on one device"
for format in $formats; do
  printf -- '-- %s\n' "$format"
  hsai generate $run/bundles/$format "def __init__(self" --graphs --max-tokens 32
done

step "6/6 compare"
# shellcheck disable=SC2086
hsai eval $(printf "$run/bundles/%s " $formats) --speed --json $run/results.json

cat <<END

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. The loss curve is $run/loss.png. Next:
  source .venv/bin/activate
  hsai generate $run/bundles/int4 "class Stack:" --temperature 0.8      # another prompt, drawn at random
  hsai train configs/quickstart_nm24.py                                # 2:4 sparse from the first step: a fork of one line
  hsai train configs/quickstart.py --help                              # every field is an option
END
