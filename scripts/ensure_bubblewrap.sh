#!/usr/bin/env bash
# Installs bubblewrap where it is missing and we may; else says exactly what to install.
set -euo pipefail
command -v bwrap >/dev/null && exit 0
if command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then
  SUDO=""; [ "$(id -u)" = 0 ] || SUDO="sudo -n"
  echo "installing bubblewrap with apt" >&2
  $SUDO apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $SUDO apt-get install -y -qq --no-install-recommends bubblewrap >/dev/null
  exit 0
fi
echo "error: bubblewrap is missing and this user may not install it; run: sudo apt-get install bubblewrap (or your system's equivalent), then make setup again" >&2
exit 5
