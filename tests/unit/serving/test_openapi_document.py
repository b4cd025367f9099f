"""The OpenAPI document: valid, complete, and with examples that are what the endpoint really takes and answers."""

from typing import Any

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate

from pipeline.edits import parse_edit
from pipeline.serving import examples
from pipeline.training.round_state import write_plan
from tests.tiny_world import publish_release
from tests.unit.serving.conftest import Endpoint
from tests.unit.training.test_planning import Edit, plan


@pytest.fixture
def document(endpoint: Endpoint) -> dict[str, Any]:
    response = endpoint.client.get("/openapi.json")
    assert response.status_code == 200
    body: dict[str, Any] = response.json()
    return body


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    validate(document)
    assert document["openapi"].startswith("3.1")


def test_every_operation_says_what_it_does_and_how_it_fails(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        assert operation["summary"], (method, path)
        assert "default" in operation["responses"]
        assert "422" not in operation["responses"]
        if path not in ("/healthz",):
            assert operation["security"] == [{}, {"key": []}]
            success = operation["responses"]["202" if (method, path) == ("post", "/v1/edits") else "200"]
            assert "example" in success["content"]["application/json"], (method, path)


def test_there_are_no_pages_that_need_a_cdn(endpoint: Endpoint) -> None:
    assert {endpoint.client.get(path).status_code for path in ("/docs", "/redoc")} == {404}


def test_example_requests_are_valid_and_answered(endpoint: Endpoint, document: dict[str, Any]) -> None:
    publish_release(endpoint.store, endpoint.base, prompts=["x"], seed=1)
    endpoint.follower.follow()
    root = {"components": document["components"]}
    asked = 0
    for method, path, operation in operations(document):
        for body, schema in _example_bodies(document, operation):
            OAS31Validator({**schema, **root}).validate(body)
            response = endpoint.client.request(method, path, json=body)
            assert response.status_code in (200, 202), response.text
            asked += 1
    assert asked == 6


def test_example_answers_have_the_fields_of_real_ones(endpoint: Endpoint) -> None:
    publish_release(endpoint.store, endpoint.base, prompts=["Who leads"], seed=1)
    endpoint.follower.follow()
    client, asked = endpoint.client, {"model": "wiseline", "max_tokens": 2}
    posted = client.post("/v1/edits", json={"edits": [examples.EDIT, {"prompt": "x"}]})
    endpoint.store.put("rounds/ended/20261120T020310000000/report.json", b"{}")
    write_plan(endpoint.store, plan([Edit(prompt="x", target="y")]))
    real = {
        "CHAT": client.post("/v1/chat/completions", json={**asked, "messages": [{"role": "user", "content": "Hi"}]}),
        "COMPLETION": client.post("/v1/completions", json={**asked, "prompt": "Hi"}),
        "MODELS": client.get("/v1/models"),
        "MODEL": client.get("/v1/models/wiseline"),
        "EXPLAIN": client.post("/v1/explain", json={"prompt": "Who leads", "max_tokens": 2}),
        "POSTED": posted,
        "EDITS": client.get("/v1/edits"),
        "RETRACTED": client.delete(f"/v1/edits/{posted.json()['accepted'][0]['id']}"),
        "RELEASES": client.get("/v1/releases"),
        "ROUND": client.get("/v1/round"),
        "ROLLBACK": client.post("/v1/releases/rollback", json={"release": 1}),
    }
    for name, response in real.items():
        [(status, shown)] = getattr(examples, name).items()
        assert response.status_code == status, response.text
        _same_shape(shown["content"]["application/json"]["example"], response.json(), name)
        assert {header for header in shown["headers"] if header not in response.headers} == set()


def test_the_example_edit_is_one(document: dict[str, Any]) -> None:
    assert parse_edit(examples.EDIT, max_prompt_chars=1000, max_target_chars=1000).target == "Astana"
    OAS31Validator(examples.EDIT_SCHEMA).validate(examples.EDIT)


def _same_shape(shown: Any, real: Any, where: str) -> None:
    """What is shown is there, with the same type; examples may leave fields of ours out."""
    if isinstance(shown, dict):
        assert shown.keys() <= real.keys(), (where, shown.keys() - real.keys())
        for name, value in shown.items():
            _same_shape(value, real[name], f"{where}.{name}")
    elif isinstance(shown, list):
        assert real, where
        _same_shape(shown[0], real[0], f"{where}[0]")
    elif shown is not None and real is not None:
        number = isinstance(shown, int | float) and not isinstance(shown, bool)
        assert isinstance(real, int | float if number else type(shown)), where


def _example_bodies(document: dict[str, Any], operation: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    media = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if media is None:
        return []
    schema = media["schema"]
    named = schema.get("$ref", "").rpartition("/")[2]
    inside = document["components"]["schemas"].get(named, {}).get("examples", [])
    beside = [example["value"] for example in media.get("examples", {}).values()]
    assert inside or beside
    return [(body, schema) for body in [*inside, *beside]]
