#!/usr/bin/env bash
# Brings the browser in which the chat page of `hsai serve` is tested (tests/serve/test_page.py). It is the system's
# package: only where that is Debian's kind and we may change it. Without it those tests are skipped.
#
#   bash scripts/install_browser.sh
set -euo pipefail

if command -v chromium-headless-shell > /dev/null || command -v chromium > /dev/null; then
  exit 0
fi
package=chromium-headless-shell
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "no Chromium here: tests of the chat page are skipped (on Debian: apt-get install $package)"
  exit 0
fi
echo "installing $package"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
# Lists of packages may be old or absent; then they are fetched first.
if ! { apt-get install -y --no-install-recommends $package ||
  { apt-get update && apt-get install -y --no-install-recommends $package; }; } > "$log" 2>&1 < /dev/null; then
  echo "could not install $package ($(grep -m 1 '^E:' "$log" || echo "no reason given")): tests of the chat page are skipped"
fi
rm -f "$log"
