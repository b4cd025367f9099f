#!/usr/bin/env bash
# KubeRay's definitions at the version the manifests are tested with, checked before a cluster sees them.
#   install_crds.sh            fetches them into a temporary folder and applies them with kubectl
#   install_crds.sh FOLDER     only fetches and checks them
set -euo pipefail
VERSION=v1.7.0
SOURCE="https://raw.githubusercontent.com/ray-project/kuberay/$VERSION/helm-chart/kuberay-operator/crds"
SUMS="$(cd "$(dirname "$0")" && pwd)/crds.sha256"
folder="${1:-$(mktemp -d)}"
mkdir -p "$folder"
cd "$folder"
for kind in rayclusters rayjobs rayservices raycronjobs; do
  [ -e "$kind.crd.yaml" ] || curl --fail --silent --show-error --location --output "$kind.crd.yaml" "$SOURCE/ray.io_$kind.yaml"
done
sha256sum --check --strict --quiet "$SUMS" || {
  echo "What was fetched into $folder is not what wiseline was tested with; nothing was applied." >&2
  exit 1
}
[ $# -eq 0 ] || { echo "KubeRay's definitions are in $folder."; exit 0; }
# Server-side: they are too large for the annotation that a plain apply keeps.
kubectl apply --server-side --filename "$folder"
