"""What a PromQL expression asks for."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

GRAFANA = {"$__rate_interval": "5m", "$__interval": "1m", "$__range": "1h"}


@dataclass(frozen=True)
class Asked:
    """A series by its name, and the labels that it is chosen by."""

    name: str
    labels: frozenset[str]


def asked(expression: str) -> list[Asked]:
    """By the grammar of Prometheus itself; skipped where its parser is not installed, but never in CI."""
    if os.environ.get("CI") != "true":
        pytest.importorskip("promql_parser")
    import promql_parser

    for variable, value in GRAFANA.items():
        expression = expression.replace(variable, value)
    return list(_selectors(promql_parser.parse(expression)))


def _selectors(tree: Any) -> Iterator[Asked]:
    if type(tree).__name__ == "VectorSelector":
        yield Asked(tree.name, frozenset(matcher.name for matcher in tree.matchers.matchers))
    for part in ("expr", "lhs", "rhs", "param", "vector_selector"):
        below = getattr(tree, part, None)
        if below is not None and not isinstance(below, str | float):
            yield from _selectors(below)
    for argument in getattr(tree, "args", None) or ():
        yield from _selectors(argument)


def grouped_by(expression: str) -> set[str]:
    """Labels that an aggregation keeps."""
    return {name.strip() for kept in re.findall(r"\bby \(([^)]*)\)", expression) for name in kept.split(",")}
