"""A CustomResourceDefinition as a JSON schema that refuses what the API server would silently drop."""

from typing import Any

# What every object may carry besides its own fields; the API server checks it, not the definition.
METADATA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


def json_schema_of(definition: dict[str, Any], version: str) -> dict[str, Any]:
    """Of one served version of a CustomResourceDefinition."""
    [found] = [one for one in definition["spec"]["versions"] if one["name"] == version and one["served"]]
    schema = closed(found["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = METADATA
    schema["properties"]["kind"] = {"const": definition["spec"]["names"]["kind"]}
    schema["properties"]["apiVersion"] = {"const": f"{definition['spec']['group']}/{version}"}
    return schema


def closed(schema: Any) -> Any:
    """A structural schema, with every object closed unless it says itself what else it takes."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    # Under these two names are schemas by field; everywhere else a name is a keyword.
    result = {
        key: {name: closed(one) for name, one in value.items()} if key == "properties" else closed(value)
        for key, value in schema.items()
        if key not in ("description", "default", "enum", "required")
    }
    result |= {key: schema[key] for key in ("enum", "required") if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    if schema.get("nullable"):
        result["type"] = [result["type"], "null"]
    return result
