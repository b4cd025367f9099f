"""The files of `ray up` against Ray's own schema, and the instances they ask for against EC2's."""

import json
import re
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.unit.cluster.conftest import ROOT

FILES = ["aws.yaml", "local.yaml"]


def read(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / name).read_text())
    return config


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_it(name: str) -> None:
    """The schema closes the top level itself; so is every object of it that names its fields."""
    schema = json.loads((Path(ray.autoscaler.__path__[0]) / "ray-schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(read(name))
    validate_config(prepare_config(read(name)))
    assert schema["additionalProperties"] is False
    for key in ("provider", "auth", "docker"):
        assert read(name).get(key, {}).keys() <= schema["properties"][key]["properties"].keys()


def test_ray_makes_nodes_of_the_machines() -> None:
    prepared = prepare_config(read("local.yaml"))
    [node_type] = prepared["available_node_types"].values()
    assert node_type["max_workers"] == prepared["max_workers"] == len(read("local.yaml")["provider"]["worker_ips"])


def test_ec2_takes_the_instances() -> None:
    session = botocore.session.get_session()
    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    for node_type in read("aws.yaml")["available_node_types"].values():
        request = {"MinCount": 1, "MaxCount": 1, **node_type["node_config"]}
        assert set(request) <= set(shape.members)
        report = botocore.validate.ParamValidator().validate(request, shape)
        assert not report.has_errors(), report.generate_report()


@pytest.mark.parametrize("name", FILES)
def test_the_token_is_asked_for_on_every_node(name: str) -> None:
    config = read(name)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert any("RAY_AUTH_MODE=token" in command and "ray start" in command for command in commands)
    assert any(target.endswith(".ray/auth_token") for target in config["file_mounts"])


def test_rays_image_is_the_pinned_version() -> None:
    [pin] = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert read("aws.yaml")["docker"]["image"] == f"rayproject/ray:{pin}-py311-gpu"
