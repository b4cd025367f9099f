from typing import Any

import jsonschema
import pytest

from tests.unit.cluster.closed_schema import closed

SCHEMA = {
    "type": "object",
    "properties": {
        "size": {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]},
        "properties": {"type": "object", "properties": {"a": {"type": "integer"}}},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        "list": {
            "type": "array",
            "items": {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]},
        },
    },
}


@pytest.mark.parametrize(
    ("document", "good"),
    [
        ({"size": 1, "labels": {"any": "x"}, "open": {"any": 1}, "list": [{"b": "x"}], "properties": {"a": 1}}, True),
        ({"size": "1Gi"}, True),
        ({"size": 1.5}, False),
        ({"sise": 1}, False),
        ({"properties": {"b": 1}}, False),
        ({"labels": {"any": 1}}, False),
        ({"list": [{"b": "x", "c": 1}]}, False),
        ({"list": [{}]}, False),
    ],
)
def test_what_is_not_named_is_refused(document: dict[str, Any], good: bool) -> None:
    assert jsonschema.Draft202012Validator(closed(SCHEMA)).is_valid(document) == good
