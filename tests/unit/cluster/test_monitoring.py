"""Dashboards and alert rules: well formed, about metrics that exist, and the same on Kubernetes as without."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from pipeline.metrics import METRICS
from tests.monitoring import ALERTS, DASHBOARDS, RULES, expressions, panels
from tests.promql import Asked, asked, grouped_by
from tests.unit.cluster.conftest import ROOT, named, pods, rendered

OPERATIONS = (ROOT / "docs/operations.md").read_text()
# What Ray, Prometheus and its operator say of every series.
COMMON = {"le", "namespace", "WorkerId", "NodeAddress", "SessionName"}

dashboard = pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)


def series(name: str) -> set[str]:
    """Under which names Prometheus knows a metric of the table."""
    parts = ("_bucket", "_sum", "_count") if METRICS[name].kind == "histogram" else ("",)
    return {f"ray_{name}{part}" for part in parts}


def test_names_follow_prometheus() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"wiseline_[a-z_]+", name)
        assert name.endswith("_total") == (metric.kind == "counter"), name
        if metric.unit in ("seconds", "bytes"):
            assert f"_{metric.unit}" in name
        assert bool(metric.boundaries) == (metric.kind == "histogram")
        assert list(metric.boundaries) == sorted(set(metric.boundaries))


@pytest.mark.parametrize("expression", sorted(expressions()))
def test_what_is_asked_for_is_in_the_table(expression: str) -> None:
    known = {one: set(METRICS[name].labels) for name in METRICS for one in series(name)}
    for one in asked(expression):
        if one.name.startswith("ray_wiseline_"):
            assert one.name in known
            assert one.labels <= known[one.name] | COMMON
            assert grouped_by(expression) <= known[one.name] | COMMON


def test_the_grammar_finds_every_series() -> None:
    expression = (
        'histogram_quantile(0.9, sum by (le) (rate(a_bucket{x="{b}"}[$__rate_interval]))) > on (n) group_left abs(-c)'
    )
    assert asked(expression) == [Asked("a_bucket", frozenset({"x"})), Asked("c", frozenset())]
    assert grouped_by(expression) == {"le"}


def test_every_metric_is_shown_or_watched() -> None:
    shown = {one.name for expression in expressions() for one in asked(expression)}
    assert [name for name in METRICS if not series(name) & shown] == []


@dashboard
def test_a_dashboard_is_one_that_grafana_draws(dashboard: Path) -> None:
    board = json.loads(dashboard.read_text())
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= board.keys()
    assert "id" not in board  # Grafana's own; a provisioned one has none
    every = board["panels"]
    assert max(Counter(panel["id"] for panel in every).values()) == 1
    for one, other in combinations([panel["gridPos"] for panel in every], 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert apart or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in every)
    variables = {variable["name"] for variable in board["templating"]["list"]}
    for panel in panels(dashboard):
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert set(re.findall(r"\$(?!__)(\w+)", target["expr"])) <= variables


def test_dashboards_have_names_of_their_own() -> None:
    assert len({json.loads(path.read_text())["uid"] for path in DASHBOARDS}) == len(DASHBOARDS)


def test_alerts_say_what_to_do() -> None:
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("info", "warning", "critical")
        assert alert["annotations"].keys() == {"summary"}
        assert f"| `{alert['alert']}` |" in OPERATIONS
    assert set(re.findall(r"`(Wiseline\w+)`", OPERATIONS)) == {alert["alert"] for alert in ALERTS}


def test_docs_name_every_metric_as_the_table_does() -> None:
    rows = dict(re.findall(r"^\| `(wiseline_\w+)` (\|.*\|)$", OPERATIONS, re.MULTILINE))
    assert rows == {name: row(name) for name in METRICS}


def row(name: str) -> str:
    metric = METRICS[name]
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| {metric.kind} | {metric.unit} | {labels} | {metric.reporter} | {metric.meaning} |"


def test_the_operator_gets_the_same_rules() -> None:
    assert named("monitored", "PrometheusRule")["spec"] == yaml.safe_load(RULES.read_text())


def test_every_node_of_ray_is_scraped() -> None:
    spec = named("monitored", "PodMonitor")["spec"]
    [endpoint] = spec["podMetricsEndpoints"]
    nodes = [pod for pod in pods("monitored") if any(one["name"].startswith("ray-") for one in pod["containers"])]
    found = [
        port["containerPort"]
        for pod in nodes
        for one in pod["containers"]
        for port in one.get("ports", [])
        if port["name"] == endpoint["port"]
    ]
    submitters = [pod for pod in nodes if pod["containers"][0]["name"] == "ray-job-submitter"]
    assert len(found) == len(nodes) - len(submitters)
    policy = named("monitored", "NetworkPolicy", "metrics")["spec"]
    assert policy["podSelector"] == spec["selector"]
    assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == sorted(set(found))


def test_grafana_finds_the_dashboards() -> None:
    maps = [one for one in rendered("monitored") if one["kind"] == "ConfigMap"]
    [dashboards] = [one for one in maps if "grafana_dashboard" in one["metadata"].get("labels", {})]
    assert dashboards["data"] == {path.name: path.read_text() for path in DASHBOARDS}
    compose = yaml.safe_load((ROOT / "cluster/compose.yaml").read_text())["services"]
    provider = yaml.safe_load((ROOT / "cluster/compose/dashboards.yaml").read_text())["providers"][0]
    mounted = dict(reversed(volume.split(":")[:2]) for volume in compose["grafana"]["volumes"])
    assert mounted[provider["options"]["path"]] == "./monitoring/dashboards"
    read = yaml.safe_load((ROOT / "cluster/compose/prometheus.yaml").read_text())["rule_files"]
    mounted = dict(reversed(volume.split(":")[:2]) for volume in compose["prometheus"]["volumes"])
    assert [mounted[path] for path in read] == ["./monitoring/rules.yaml"]
