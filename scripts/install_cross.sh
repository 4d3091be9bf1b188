#!/usr/bin/env bash
# Brings what the tests of kernels for other machines need (tests/kernels/test_cross.py): a compiler for 64-bit ARM and
# an emulator; and clang, the other compiler that has to take the sources without a warning
# (tests/kernels/test_native_builds.py). They are the system's packages: only where that is Debian's kind and we may
# change it. Without them those tests are skipped.
#
#   bash scripts/install_cross.sh
set -euo pipefail

if command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64 > /dev/null && command -v clang++ > /dev/null
then
  exit 0
fi
packages="g++-aarch64-linux-gnu qemu-user clang"
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "no ARM compiler and emulator, or no clang: their tests are skipped (on Debian: apt-get install $packages)"
  exit 0
fi
echo "installing $packages"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
# Lists of packages may be old or absent; then they are fetched first.
if ! { apt-get install -y --no-install-recommends $packages ||
  { apt-get update && apt-get install -y --no-install-recommends $packages; }; } > "$log" 2>&1 < /dev/null; then
  echo "could not install $packages ($(grep -m 1 '^E:' "$log" || echo "no reason given")): their tests are skipped"
fi
rm -f "$log"
