"""The Argo manifests and the Airflow DAG drive commands that `wiseline` has."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from jobs.cli import app
from jobs.round_step import STEPS, check_options
from tests.unit.cluster.conftest import ROOT

ARGO, DAG = ROOT / "cluster/argo", ROOT / "cluster/airflow/wiseline_round.py"


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ARGO / name).read_text()))


def templates() -> dict[str, dict[str, Any]]:
    [workflow] = manifests("round.yaml")
    return {template["name"]: template for template in workflow["spec"]["templates"]}


def lost(said: Any, kept: Any, where: str = "") -> Iterator[str]:
    """What a model did not take over: it ignores fields that it does not know."""
    if isinstance(said, dict) and isinstance(kept, dict):
        for name, value in said.items():
            yield from lost(value, kept.get(name), f"{where}.{name}")
    elif isinstance(said, list) and isinstance(kept, list) and len(said) == len(kept):
        for place, value in enumerate(said):
            yield from lost(value, kept[place], f"{where}[{place}]")
    elif said != kept:
        yield where


@pytest.mark.parametrize("name", ["round.yaml", "nightly.yaml"])
def test_argo_knows_every_field(name: str) -> None:
    models = pytest.importorskip("hera.workflows.models")  # made from Argo's own schema
    for manifest in manifests(name):
        kind = getattr(models, manifest["kind"])

        def taken(said: dict[str, Any], kind: Any = kind) -> list[str]:
            kept = kind.model_validate(said).model_dump_json(by_alias=True, exclude_none=True)
            return list(lost(said, json.loads(kept)))

        assert taken(manifest) == []
        assert taken({**manifest, "spec": {**manifest["spec"], "retries": 1}}) == [".spec.retries"]


def parsed(words: list[str]) -> dict[str, Any]:
    """Options of `wiseline …`; raises what the command line would."""
    command = typer.main.get_command(app)
    context = command.make_context("wiseline", [*words], resilient_parsing=False)
    name, sub, rest = command.resolve_command(context, [*context._protected_args, *context.args])  # type: ignore[attr-defined]
    return dict(sub.make_context(name, rest, parent=context).params)


def test_every_task_of_the_workflow_is_a_step_that_the_command_takes() -> None:
    [line] = templates()["step"]["container"]["args"]
    tasks = {task["name"]: task for task in templates()["round"]["dag"]["tasks"]}
    assert tuple(tasks) == STEPS
    for name, task in tasks.items():
        if name == "plan":
            continue
        given = {one["name"]: one["value"] for one in task["arguments"]["parameters"]}
        words = line.replace("{{inputs.parameters.step}}", given["step"]).replace("{{inputs.parameters.round}}", "0abc")
        words = words.replace("{{inputs.parameters.more}}", given.get("more", "")).replace("{{item}}", "3").split()
        options = parsed(words[1:])
        shards = list(options["shard"] or ()) or None
        check_options(options["step"], options["round_id"], shards)
        assert (options["step"], shards) == (name, [3] if name == "train" else None)


def test_the_planning_script_hands_on_the_round_and_its_shards(tmp_path: Path) -> None:
    [script] = templates()["plan"]["container"]["args"]
    [line] = [line for line in script.splitlines() if line.startswith("wiseline")]
    assert parsed(line.split(" > ")[0].split()[1:])["step"] == "plan"
    (tmp_path / "wiseline").write_text('#!/bin/sh\necho \'{"round": "0abc", "shards": [0, 2], "stands": null}\'\n')
    (tmp_path / "wiseline").chmod(0o755)
    subprocess.run(
        ["sh", "-ec", script.replace("/tmp/", f"{tmp_path}/")],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
    )
    written = {one["name"]: one["valueFrom"]["path"] for one in templates()["plan"]["outputs"]["parameters"]}
    read = {name: (tmp_path / Path(path).name).read_text() for name, path in written.items()}
    assert (read["round"], json.loads(read["shards"])) == ("0abc", [0, 2])


def test_the_night_starts_the_template_in_the_image_of_the_other_manifests() -> None:
    [workflow], [night] = manifests("round.yaml"), manifests("nightly.yaml")
    assert night["spec"]["workflowSpec"]["workflowTemplateRef"]["name"] == workflow["metadata"]["name"]
    account = {manifest["kind"]: manifest for manifest in manifests("service-account.yaml")}["ServiceAccount"]
    assert workflow["spec"]["serviceAccountName"] == account["metadata"]["name"]
    kuberay = (ROOT / "cluster/kuberay/base/round.yaml").read_text()
    images = {template["container"]["image"] for template in templates().values() if "container" in template}
    assert images == set(re.findall(r"image: (wiseline:\S+)", kuberay))


def test_airflow_loads_the_dag(tmp_path: Path) -> None:
    """`AIRFLOW_PYTHON`: a Python that has apache-airflow 3; its dependencies are not ours."""
    python = os.environ.get("AIRFLOW_PYTHON")
    if not python:
        pytest.skip("AIRFLOW_PYTHON names no Python with Airflow")
    program = (
        "import json, sys; from airflow.dag_processing.dagbag import DagBag; bag = DagBag(sys.argv[1]);"
        "assert not bag.import_errors, bag.import_errors; [dag] = bag.dags.values();"
        "print(json.dumps({task.task_id: sorted(task.downstream_task_ids) for task in dag.tasks}))"
    )
    environment = {**os.environ, "AIRFLOW_HOME": str(tmp_path), "PYTHONPATH": ""}
    done = subprocess.run(
        [python, "-c", program, str(DAG.parent)], env=environment, capture_output=True, text=True, check=True
    )
    order = ["plan", "shards", "train", "merge", "evaluate", "publish"]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        one: [following] if following else [] for one, following in zip(order, [*order[1:], None], strict=True)
    }
