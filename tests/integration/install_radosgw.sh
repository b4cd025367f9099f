#!/usr/bin/env bash
# Unpacks Debian's radosgw and what it needs under a cache folder; neither installs anything nor needs root.
# Usage: install_radosgw.sh [FOLDER]   (default: $WISELINE_RADOSGW, else ~/.cache/wiseline/radosgw)
set -euo pipefail

root=${1:-${WISELINE_RADOSGW:-${XDG_CACHE_HOME:-$HOME/.cache}/wiseline/radosgw}}
if [ -e "$root/complete" ]; then
  echo "radosgw is already unpacked in $root"
  exit 0
fi
mkdir -p "$root/archives/partial"

# A fresh container has no package lists; fetching them is the one step that needs root.
apt-cache show radosgw >/dev/null 2>&1 || apt-get update --quiet --quiet

# apt resolves the dependencies and skips what this machine already has, so the libraries match the system's own.
download() {
  apt-get install --yes --quiet --quiet --download-only --no-install-recommends \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$root/archives" -o APT::Sandbox::User= \
    radosgw ceph-mon ceph-osd ceph-common
}
download || { apt-get update --quiet --quiet && download; } # stale lists name packages that are gone

shopt -s nullglob
for package in "$root"/archives/*.deb; do
  dpkg -x "$package" "$root"
  rm "$package"
done
[ -n "$(find "$root" -path '*bin/radosgw' -print -quit)" ] || command -v radosgw >/dev/null || {
  echo "apt-get downloaded no radosgw; run apt-get update first" >&2
  exit 1
}
touch "$root/complete"
echo "radosgw is unpacked in $root"
