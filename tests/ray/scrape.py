"""What Prometheus would read of this Ray."""

import time
import urllib.request

import ray
from prometheus_client.parser import text_string_to_metric_families

from pipeline.metrics import METRICS
from tests.monitoring import expressions
from tests.promql import Asked, asked, grouped_by

UNNAMED = {"namespace"}  # on Kubernetes Prometheus itself adds it

Sample = tuple[str, frozenset[tuple[str, str]]]
Samples = dict[Sample, float]


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


def wait_for(wanted: list[Asked], *, since: Samples, seconds: float) -> None:
    """Until each has a sample; of ours one that is new since then, or has changed. Ray hands metrics on every ten
    seconds, and keeps what processes that are gone have counted."""
    deadline = time.monotonic() + seconds
    while missing := _missing(wanted, since):
        assert time.monotonic() < deadline, missing
        time.sleep(1)


def _missing(wanted: list[Asked], since: Samples) -> list[Asked]:
    labels: dict[str, set[str]] = {}
    for (name, named), value in scraped().items():
        if since.get((name, named)) != value or not name.startswith("ray_wiseline_"):
            labels.setdefault(name, set()).update(label for label, _ in named)
    return [one for one in wanted if one.name not in labels or not one.labels <= labels[one.name]]


def scraped() -> Samples:
    """Every series, as queries name it, with its labels."""
    found: Samples = {}
    for family in text_string_to_metric_families(text()):
        for sample in family.samples:
            found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found
