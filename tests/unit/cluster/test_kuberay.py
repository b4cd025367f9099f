"""Every manifest, as kustomize renders it, against the schemas that a cluster would hold it against."""

import copy
import functools
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from pipeline.config import Config, load_config
from pipeline.serving.carry_on import in_serves_proxy
from pipeline.serving.declared import EndpointArguments
from tests.unit.cluster.closed_schema import closed, json_schema_of
from tests.unit.cluster.conftest import KUBERAY, OVERLAYS, ROOT, named, pods, ray_clusters, render, rendered

DEFINITIONS = ROOT.parent / "shared/kuberay-crds"
KUBERNETES = "1.34"  # the version whose schemas the other manifests are held against

overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@functools.cache
def schema_of(kind: str) -> jsonschema.Draft202012Validator:
    file = DEFINITIONS / f"{kind.lower()}s.crd.yaml"
    if not file.exists():
        pytest.skip(f"no {file}")
    return jsonschema.Draft202012Validator(json_schema_of(yaml.load(file.read_text(), yaml.CSafeLoader), "v1"))


def problems(manifest: dict[str, Any]) -> tuple[str, ...]:
    return _problems(json.dumps(manifest))


@functools.cache  # most manifests are the same in every overlay
def _problems(text: str) -> tuple[str, ...]:
    manifest = json.loads(text)
    if manifest["apiVersion"].startswith("ray.io/"):
        errors = schema_of(manifest["kind"]).iter_errors(manifest)
        return tuple(f"{error.json_path}: {error.message}" for error in errors)
    if manifest["apiVersion"] == "monitoring.coreos.com/v1":
        schema = json.loads((Path(__file__).parent / f"schemas/{manifest['kind'].lower()}.json").read_text())
        errors = jsonschema.Draft202012Validator(closed(schema)).iter_errors(manifest)
        return tuple(f"{error.json_path}: {error.message}" for error in errors)
    if os.environ.get("CI") != "true":
        pytest.importorskip("kubernetes_validate")
    import kubernetes_validate

    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (error.message,)
    return ()


@overlay
def test_every_manifest_is_one_the_api_server_takes_whole(overlay: str) -> None:
    manifests = rendered(overlay)
    assert {one["kind"] for one in manifests} >= {
        "RayCluster",
        "RayService",
        "RayJob",
        "NetworkPolicy",
        "PodDisruptionBudget",
    }
    assert {one["metadata"]["name"]: found for one in manifests if (found := problems(one))} == {}


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("RayService", ["spec", "rayClusterConfig", "headGroupSpec", "template", "spec"]),
        ("RayCluster", ["spec", "workerGroupSpecs", 0]),
        ("RayJob", ["spec"]),
        ("CronJob", ["spec", "jobTemplate", "spec"]),
        ("NetworkPolicy", ["spec"]),
        ("StatefulSet", ["spec", "template", "spec", "containers", 0]),
        ("PodMonitor", ["spec", "podMetricsEndpoints", 0]),
        ("PrometheusRule", ["spec", "groups", 0, "rules", 0]),
    ],
)
def test_a_field_nobody_knows_is_noticed(kind: str, path: list[Any]) -> None:
    manifest = copy.deepcopy(next(one for one in rendered("monitored") if one["kind"] == kind))
    place: Any = manifest
    for step in path:
        place = place[step]
    place["concurencyPolicy"] = "Forbid"
    assert any("concurencyPolicy" in problem for problem in problems(manifest))


@overlay
def test_ray_is_one_version_everywhere(overlay: str) -> None:
    [pin] = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {cluster["rayVersion"] for cluster in ray_clusters(overlay).values()} == {pin}
    images = {container["image"] for pod in pods(overlay) for container in pod["containers"]}
    ours = {image for image in images if "wiseline" in image}
    assert ours == {f"wiseline-cuda:{pin}" if overlay == "nvidia-gpu" else f"wiseline:{pin}"}
    assert images - ours == {"redis:7.4"}


@overlay
def test_serve_reads_its_config_whole(overlay: str) -> None:
    said = yaml.safe_load(named(overlay, "RayService")["spec"]["serveConfigV2"])
    [application] = ServeDeploySchema.model_validate(said).applications
    closed_keys(said, ServeDeploySchema)
    module, _, builder = application.import_path.partition(":")
    assert (module, builder) == ("pipeline.serving.declared", "endpoint")
    arguments = EndpointArguments.model_validate(application.args)
    assert str(arguments.config) == "/etc/wiseline/ray_config.yaml"
    [deployment] = application.deployments
    assert deployment.is_autoscaling_configured()
    [workers] = named(overlay, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    scaling = deployment.autoscaling_config
    assert isinstance(scaling, dict)
    assert workers["minReplicas"] >= scaling["min_replicas"] >= 2  # so that one may be drained
    assert workers["maxReplicas"] > scaling["max_replicas"]
    assert scaling["target_ongoing_requests"] <= config_of(overlay).serve.max_batch_requests


@overlay
def test_answers_of_the_endpoint_outlive_their_replica(overlay: str) -> None:
    """Serve's proxies take the middleware from their environment; heads have proxies too."""
    path = in_serves_proxy.__module__ + "." + in_serves_proxy.__name__
    cluster = ray_clusters(overlay)["RayService"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        assert {"name": "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "value": path} in container["env"]


def closed_keys(said: dict[str, Any], schema: Any) -> None:
    """Serve drops keys that it does not know; here they are refused, at every level that its schema names."""
    from ray.serve.config import AutoscalingConfig, HTTPOptions
    from ray.serve.schema import DeploymentSchema, HTTPOptionsSchema, ServeApplicationSchema

    assert said.keys() <= schema.model_fields.keys()
    assert said["http_options"].keys() <= HTTPOptionsSchema.model_fields.keys() | HTTPOptions.model_fields.keys()
    for application in said["applications"]:
        assert application.keys() <= ServeApplicationSchema.model_fields.keys()
        for deployment in application["deployments"]:
            assert deployment.keys() <= DeploymentSchema.model_fields.keys()
            assert deployment["autoscaling_config"].keys() <= AutoscalingConfig.model_fields.keys()


def config_of(overlay: str) -> Config:
    text = named(overlay, "ConfigMap", "wiseline-config")["data"]["ray_config.yaml"]
    return Config.model_validate(yaml.safe_load(text))


@overlay
def test_pods_read_the_config_that_is_mounted(overlay: str, tmp_path: Path) -> None:
    (tmp_path / "ray_config.yaml").write_text(named(overlay, "ConfigMap", "wiseline-config")["data"]["ray_config.yaml"])
    config = load_config(tmp_path / "ray_config.yaml")
    gpus = 1 if overlay == "nvidia-gpu" else 0
    assert (config.serve.gpus_per_replica, config.resources.gpus_per_trainer) == (gpus, gpus)
    assert config.serve.keys_file is not None  # other machines reach this endpoint
    for cluster in ray_clusters(overlay).values():
        [workers] = cluster["workerGroupSpecs"]
        [container] = workers["template"]["spec"]["containers"]
        assert int(container["resources"]["limits"].get("nvidia.com/gpu", 0)) == gpus


@overlay
def test_every_pod_is_nobody_on_a_read_only_disk(overlay: str) -> None:
    found = pods(overlay)
    assert len(found) >= 9
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"] and container["resources"]["limits"]["memory"]
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            claims = {"data"} if "redis" in container["image"] else set()
            assert mounts <= {volume["name"] for volume in pod.get("volumes", [])} | claims
            if container["name"].startswith("ray-") and container["name"] != "ray-job-submitter":
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
                assert {"secretRef": {"name": "wiseline-s3", "optional": True}} in container["envFrom"]


@overlay
def test_only_those_who_ask_the_api_server_carry_a_token(overlay: str) -> None:
    accounts = {one["metadata"]["name"]: one for one in rendered(overlay) if one["kind"] == "ServiceAccount"}
    assert not any(account["automountServiceAccountToken"] for account in accounts.values())
    for pod in pods(overlay):
        asks = pod.get("serviceAccountName") in ("wiseline-head", "wiseline-nightly")
        assert pod["automountServiceAccountToken"] == asks
        assert pod.get("serviceAccountName", "wiseline") in accounts
    assert named(overlay, "Role")["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]


@overlay
def test_ports_that_probes_and_policies_name_exist(overlay: str) -> None:
    served = {
        port["containerPort"] for pod in pods(overlay) for one in pod["containers"] for port in one.get("ports", [])
    }
    for pod in pods(overlay):
        for container in pod["containers"]:
            names = {port["name"] for port in container.get("ports", [])}
            probes = [container[key] for key in ("startupProbe", "readinessProbe", "livenessProbe") if key in container]
            assert {probe["httpGet"]["port"] for probe in probes if "httpGet" in probe} <= names
    policies = [one for one in rendered(overlay) if one["kind"] == "NetworkPolicy"]
    opened = {
        port["port"] for one in policies for rule in one["spec"].get("ingress", []) for port in rule.get("ports", [])
    }
    assert opened <= served
    everything = named(overlay, "NetworkPolicy", "nothing-by-default")["spec"]
    assert everything == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@overlay
def test_selectors_find_the_pods_they_mean(overlay: str) -> None:
    components = {
        kind: {
            group["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
        }
        for kind, cluster in ray_clusters(overlay).items()
    }
    assert components["RayCluster"] == {"cluster"}
    assert components["RayService"] == {"endpoint"}
    assert components["RayJob"] == {"round"}
    known = {"cluster", "endpoint", "round", "redis", "nightly"}
    text = yaml.safe_dump(
        [one["spec"] for one in rendered(overlay) if one["kind"] in ("NetworkPolicy", "PodDisruptionBudget")]
    )
    assert set(re.findall(r"app.kubernetes.io/component: (\S+)", text)) <= known


def test_a_night_has_one_round_at_a_time() -> None:
    cron = named("cpu", "CronJob")["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    [container] = cron["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    template = container["command"][container["command"].index("--template") + 1]
    assert named("cpu", "RayJob")["metadata"]["name"] == template
    assert named("cpu", "RayJob")["spec"]["suspend"] is True  # a template starts nothing
    # The watching pod outlives the round with all its attempts' common deadline.
    assert (
        cron["jobTemplate"]["spec"]["activeDeadlineSeconds"] > named("cpu", "RayJob")["spec"]["activeDeadlineSeconds"]
    )


def test_raycronjob_runs_the_same_round() -> None:
    assert not [one for one in rendered("raycronjob") if one["kind"] == "CronJob"]
    job, template = named("raycronjob", "RayCronJob")["spec"]["jobTemplate"], named("raycronjob", "RayJob")["spec"]
    assert job == {key: value for key, value in template.items() if key != "suspend"}


def test_spot_takes_training_alone() -> None:
    clusters = ray_clusters("spot")
    for kind, cluster in clusters.items():
        [workers] = cluster["workerGroupSpecs"]
        assert ("affinity" in workers["template"]["spec"]) == (kind != "RayService")
        assert "affinity" not in cluster["headGroupSpec"]["template"]["spec"]


def test_heads_that_stand_survive_a_restart() -> None:
    for kind, cluster in ray_clusters("cpu").items():
        assert ("gcsFaultToleranceOptions" in cluster) == (kind != "RayJob")  # a round goes on from the store
        assert cluster["authOptions"] == {"mode": "token"}


def test_users_get_the_definitions_that_were_tested() -> None:
    sums = dict(reversed(line.split()) for line in (KUBERAY / "crds.sha256").read_text().splitlines())
    if not DEFINITIONS.is_dir():
        pytest.skip(f"no {DEFINITIONS}")
    assert {name: hashlib.sha256((DEFINITIONS / name).read_bytes()).hexdigest() for name in sums} == sums
    assert set(sums) == {file.name for file in DEFINITIONS.glob("*.yaml")}


def test_an_overlay_of_ones_own(tmp_path: Path) -> None:
    """As overlays/cpu says how, with S3 by the cloud's own accounts."""
    above = os.path.relpath(KUBERAY, tmp_path.resolve())
    (tmp_path / "ray_config.yaml").write_text("model: {path: /models/mine}\n")
    (tmp_path / "kustomization.yaml").write_text(
        f"""
        resources: [{above}/overlays/cpu]
        components: [{above}/components/workload-identity]
        images: [{{name: wiseline, newName: registry.example.com/wiseline}}]
        configMapGenerator:
          - {{name: wiseline-config, namespace: wiseline, behavior: replace, files: [ray_config.yaml]}}
        """
    )
    manifests = render(tmp_path)
    config = next(one for one in manifests if one["kind"] == "ConfigMap")
    assert config["data"] == {"ray_config.yaml": "model: {path: /models/mine}\n"}
    roles = {
        one["metadata"]["name"]: one["metadata"].get("annotations", {}).get("eks.amazonaws.com/role-arn", "")[:8]
        for one in manifests
        if one["kind"] == "ServiceAccount"
    }
    assert roles == {"wiseline": "arn:aws:", "wiseline-head": "arn:aws:", "wiseline-nightly": ""}
    [cluster] = [one for one in manifests if one["kind"] == "RayCluster"]
    [container] = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert container["image"].startswith("registry.example.com/wiseline:")
