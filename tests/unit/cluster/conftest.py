"""What the manifests are held against: kustomize, KubeRay's definitions, Kubernetes' own schemas. Skipped where they
are not installed (`.[dev]` brings all but KubeRay's, which lie in ../shared), but never in CI."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
KUBERAY = ROOT / "cluster/kuberay"
OVERLAYS = sorted(folder.name for folder in (KUBERAY / "overlays").iterdir())


def program(name: str) -> str:
    """Beside this Python, where the package that brings it puts it, or on the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        missing = f"no {name}: pip install -c constraints.txt -e '.[dev]'"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return found


@functools.cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    return render(KUBERAY / "overlays" / overlay)


def render(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send."""
    command = [program("kubectl"), "kustomize", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    return list(yaml.safe_load_all(ended.stdout))


def named(overlay: str, kind: str, name: str | None = None) -> dict[str, Any]:
    [found] = [one for one in rendered(overlay) if one["kind"] == kind and name in (None, one["metadata"]["name"])]
    return found


def ray_clusters(overlay: str) -> dict[str, dict[str, Any]]:
    """The spec of every Ray cluster, by the kind that holds it."""
    clusters = {
        "RayCluster": named(overlay, "RayCluster")["spec"],
        "RayService": named(overlay, "RayService")["spec"]["rayClusterConfig"],
        "RayJob": named(overlay, "RayJob")["spec"]["rayClusterSpec"],
    }
    if overlay == "raycronjob":
        clusters["RayCronJob"] = named(overlay, "RayCronJob")["spec"]["jobTemplate"]["rayClusterSpec"]
    return clusters


def pods(overlay: str) -> list[dict[str, Any]]:
    """Every pod template there is, wherever it stands: what has containers."""
    return [pod for one in rendered(overlay) for pod in _pods(one)]


def _pods(tree: Any) -> list[dict[str, Any]]:
    if isinstance(tree, list):
        return [pod for one in tree for pod in _pods(one)]
    if not isinstance(tree, dict):
        return []
    return [tree] if "containers" in tree else [pod for one in tree.values() for pod in _pods(one)]
