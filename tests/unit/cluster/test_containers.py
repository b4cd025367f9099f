"""The Dockerfile as hadolint reads it, compose.yaml as the compose specification does. No engine starts them here."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.unit.cluster.conftest import ROOT, program

DOCKERFILE = ROOT / "Dockerfile"
COMPOSE = ROOT / "cluster/compose.yaml"


def lint(text: str) -> "subprocess.CompletedProcess[str]":
    command = [program("hadolint"), "--no-color", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)


def test_hadolint_finds_nothing() -> None:
    assert (lint(DOCKERFILE.read_text()).stdout, lint(DOCKERFILE.read_text() + "RUN cd /tmp\n").returncode) == ("", 1)


def test_what_runs_is_nobody_and_was_built_elsewhere() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.MULTILINE)[1:]
    bases = {stage.split()[2]: (stage.split()[0], stage) for stage in stages}
    for target in ("cpu", "cuda"):
        base, text = bases[target]
        assert base == "runtime"
        assert f"COPY --from=installed-{target} /opt/venv /opt/venv" in text
        assert "USER" not in text and "pip" not in text
    users = re.findall(r"^USER (\S+)", bases["runtime"][1], re.MULTILINE)
    assert users == ["10001:10001"]  # as the manifests say
    assert stages[-1].split()[2] == "cpu"


def test_the_images_are_those_of_the_manifests() -> None:
    [pin] = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert re.findall(r"--target (\S+)\s+--tag (\S+)", DOCKERFILE.read_text()) == [
        ("cpu", f"wiseline:{pin}"),
        ("cuda", f"wiseline-cuda:{pin}"),
    ]


def test_what_is_copied_is_let_through() -> None:
    """.dockerignore lets in what it names; a file that is copied must exist and be among that."""
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    assert {name for names in copied for name in names.split()} - {"."} <= let_in
    assert all((ROOT / name).exists() for name in let_in)


def compose_problems(text: str) -> str:
    if os.environ.get("CI") != "true":
        pytest.importorskip("compose_spec")
    from compose_spec import PyCompose

    try:
        PyCompose.from_yaml(text)
    except ValueError as error:
        return str(error)
    return ""


def test_compose_is_what_the_specification_takes() -> None:
    text = COMPOSE.read_text()
    assert compose_problems(text) == ""
    assert "restrat" in compose_problems(text.replace("restart:", "restrat:"))
    compose = yaml.safe_load(text)
    volumes = [volume.split(":")[0] for one in compose["services"].values() for volume in one.get("volumes", [])]
    for volume in volumes:
        source = Path(volume)
        assert volume in compose["volumes"] or source.is_absolute() or (COMPOSE.parent / source).exists()
    assert {name for one in compose["services"].values() for name in one.get("depends_on", [])} <= set(
        compose["services"]
    )
    assert all(":" in one["image"] and not one["image"].endswith(":latest") for one in compose["services"].values())


def test_compose_listens_on_loopback_alone() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    on_the_host = {name for name, one in services.items() if one.get("network_mode") == "host"}
    assert on_the_host == {"prometheus", "grafana"}
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
