#!/usr/bin/env bash
# Unpacks Debian's prometheus (with promtool) under a cache folder; neither installs anything nor needs root.
# Usage: install_prometheus.sh [FOLDER]   (default: $WISELINE_PROMETHEUS, else ~/.cache/wiseline/prometheus)
set -euo pipefail

root=${1:-${WISELINE_PROMETHEUS:-${XDG_CACHE_HOME:-$HOME/.cache}/wiseline/prometheus}}
if command -v promtool >/dev/null || [ -x "$root/usr/bin/promtool" ]; then
  echo "promtool is already there"
  exit 0
fi
mkdir -p "$root"
cd "$root"

# A fresh container has no package lists; fetching them is the one step that needs root.
apt-cache show prometheus >/dev/null 2>&1 || apt-get update --quiet --quiet
# The package alone: the libraries it depends on are for its old pages.
apt-get download -o APT::Sandbox::User= --quiet --quiet prometheus ||
  { apt-get update --quiet --quiet && apt-get download -o APT::Sandbox::User= --quiet --quiet prometheus; }
dpkg -x prometheus_*.deb .
rm prometheus_*.deb
echo "promtool is unpacked in $root/usr/bin"
