#!/usr/bin/env bash
# Installs the tool `ip`, with which tests/cluster makes its hosts. Needs root, as these tests do.
set -euo pipefail

command -v ip > /dev/null && { echo "ip is already installed"; exit 0; }
apt-cache show iproute2 > /dev/null 2>&1 || apt-get update --quiet --quiet
apt-get install --yes --quiet --quiet --no-install-recommends iproute2
