"""The endpoint as KubeRay starts it: Serve reads the manifest's `serveConfigV2`, with this test's model and store."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from jobs.serve import listen
from pipeline.serving.keys import create_key
from tests.ports import free_ports
from tests.tiny_world import save_model

ENDPOINT = Path(__file__).parents[2] / "cluster/kuberay/base/endpoint.yaml"
DEADLINE_SECONDS = 240


@pytest.fixture
def declared(local_ray: None, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address, and a key."""
    save_model(tmp_path / "model")
    sections = {
        "model": {"path": str(tmp_path / "model")},
        "store": {"uri": str(tmp_path / "store")},
        "serve": {"host": "0.0.0.0", "keys_file": str(tmp_path / "keys.json"), "gpus_per_replica": 0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
    _, key = create_key(tmp_path / "keys.json", name="tests", scopes=("infer",))
    said = yaml.safe_load(yaml.safe_load(ENDPOINT.read_text())["spec"]["serveConfigV2"])
    said["applications"][0]["args"]["config"] = str(tmp_path / "config.yaml")
    [deployment] = said["applications"][0]["deployments"]
    deployment["autoscaling_config"]["min_replicas"] = 1  # this machine has little room
    [port] = free_ports(1)
    listen("127.0.0.1", port)
    try:
        client = _get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate(said))
        ends = time.monotonic() + DEADLINE_SECONDS
        while (application := serve.status().applications["wiseline"]).status != ApplicationStatus.RUNNING:
            assert time.monotonic() < ends and application.status != ApplicationStatus.DEPLOY_FAILED, application
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", key
    finally:
        serve.shutdown()


def ask(url: str, key: str | None) -> Any:
    body = json.dumps({"model": "wiseline", "prompt": "The capital of France is", "max_tokens": 3}).encode()
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers), timeout=60) as response:
        return json.load(response)


def test_serve_runs_the_manifests_endpoint(declared: tuple[str, str]) -> None:
    url, key = declared
    assert ask(url, key)["wiseline"]["release"] == 0
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask(url, None)
    details = _get_global_client().get_serve_details()["applications"]["wiseline"]["deployments"]["wiseline"]
    scaling = details["deployment_config"]["autoscaling_config"]
    assert (scaling["max_replicas"], scaling["target_ongoing_requests"]) == (4, 32)  # the manifest's
