"""What Prometheus would read of this Ray."""

import time
import urllib.request

import ray
from prometheus_client.parser import text_string_to_metric_families

from pipeline.metrics import METRICS
from tests.monitoring import expressions
from tests.promql import Asked, asked, grouped_by

UNNAMED = {"namespace"}  # on Kubernetes Prometheus itself adds it


def text() -> str:
    """As the agents of all nodes serve it."""
    pages = []
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=30) as response:
            pages.append(response.read().decode())
    return "\n".join(pages)


def asked_for() -> list[Asked]:
    """By dashboards and alerts: every series, and the labels that it is chosen or grouped by; and every metric that
    there is."""
    wanted = [
        Asked(one.name, (one.labels | grouped_by(expression)) - UNNAMED)
        for expression in expressions()
        for one in asked(expression)
    ]
    suffix = {"histogram": "_count"}
    return wanted + [
        Asked(f"ray_{name}{suffix.get(metric.kind, '')}", frozenset(metric.labels)) for name, metric in METRICS.items()
    ]


def wait_for(wanted: list[Asked], *, seconds: float) -> None:
    """Ray hands metrics on every ten seconds."""
    deadline = time.monotonic() + seconds
    while missing := _missing(wanted):
        assert time.monotonic() < deadline, missing
        time.sleep(1)


def _missing(wanted: list[Asked]) -> list[Asked]:
    there = scraped()
    return [one for one in wanted if one.name not in there or not one.labels <= there[one.name]]


def scraped() -> dict[str, set[str]]:
    """Name of every series, as queries name it, and the labels that it has."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found
