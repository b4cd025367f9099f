"""What lies in cluster/monitoring/: dashboards, alerts, and the expressions of both."""

import json
from pathlib import Path
from typing import Any

import yaml

MONITORING = Path(__file__).parents[1] / "cluster/monitoring"
DASHBOARDS = sorted((MONITORING / "dashboards").glob("*.json"))
RULES = MONITORING / "rules.yaml"
ALERTS: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
]


def panels(dashboard: Path) -> list[dict[str, Any]]:
    """Without the rows that part them."""
    return [panel for panel in json.loads(dashboard.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> set[str]:
    drawn = {target["expr"] for path in DASHBOARDS for panel in panels(path) for target in panel["targets"]}
    return drawn | {alert["expr"] for alert in ALERTS}
