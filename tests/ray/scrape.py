"""What Prometheus would read of this Ray."""

import urllib.request

import ray
from prometheus_client.parser import text_string_to_metric_families


def text() -> str:
    """As the agents of all nodes serve it."""
    pages = []
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=30) as response:
            pages.append(response.read().decode())
    return "\n".join(pages)


def scraped() -> dict[str, set[str]]:
    """Name of every series, as queries name it, and the labels that it has."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found
