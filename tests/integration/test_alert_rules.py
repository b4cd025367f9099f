"""The alert rules as Prometheus reads them, and what they say of series that are made up."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.monitoring import ALERTS, RULES

CASES = Path(__file__).parent / "alert_cases.yaml"


@pytest.fixture(scope="module")
def promtool() -> str:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wiseline/prometheus"
    unpacked = Path(os.environ.get("WISELINE_PROMETHEUS", cache)) / "usr/bin/promtool"
    found = shutil.which("promtool") or (str(unpacked) if unpacked.exists() else None)
    if found is None:
        missing = "no promtool: run tests/integration/install_prometheus.sh"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return found


def run(*command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_prometheus_takes_the_rules(promtool: str, tmp_path: Path) -> None:
    ended = run(promtool, "check", "rules", "--lint-fatal", str(RULES), folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (tmp_path / "rules.yaml").write_text(RULES.read_text().replace("max by", "maximum by"))
    assert run(promtool, "check", "rules", "rules.yaml", folder=tmp_path).returncode == 1


def test_alerts_fire_when_they_should_and_not_before(promtool: str, tmp_path: Path) -> None:
    """alert_cases.yaml: for each alert a series on which it fires, after one on which it does not yet."""
    (tmp_path / "rules.yaml").write_text(RULES.read_text())
    (tmp_path / "cases.yaml").write_text(CASES.read_text())
    ended = run(promtool, "test", "rules", "cases.yaml", folder=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    asked = [one for case in yaml.safe_load(CASES.read_text())["tests"] for one in case["alert_rule_test"]]
    fires, not_yet = ({one["alertname"] for one in asked if bool(one["exp_alerts"]) is yes} for yes in (True, False))
    assert fires == not_yet == {alert["alert"] for alert in ALERTS}
