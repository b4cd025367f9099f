"""What docs/operations.md tells to write into an overlay is taken by kustomize and by KubeRay's definitions."""

import os
import re
from pathlib import Path

from tests.unit.cluster.conftest import KUBERAY, ROOT, render
from tests.unit.cluster.test_kuberay import problems

PAGE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")


def test_the_patch_that_switches_the_model_changes_the_endpoints_cluster_and_nothing_else(tmp_path: Path) -> None:
    [patch] = [block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "wiseline.io/model" in block]
    patch = patch.replace("\n   ", "\n").removeprefix("   ")
    base = os.path.relpath(KUBERAY / "overlays/cpu", tmp_path.resolve())
    rendered = {}
    for name, more in (("before", ""), ("after", patch)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kustomization.yaml").write_text(f"resources: [../{base}]\n{more}")
        rendered[name] = render(tmp_path / name)
    changed = [after for before, after in zip(rendered["before"], rendered["after"], strict=True) if before != after]
    [service] = changed
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
    assert (service["kind"], head["metadata"]["annotations"]) == ("RayService", {"wiseline.io/model": "NEW"})
    assert problems(service) == ()
