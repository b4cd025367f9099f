"""Who may come in: keys, scopes and limits over HTTP, and what an endpoint without keys may be bound to."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.routing import APIRoute

from pipeline.config import ServeSection
from pipeline.errors import ConfigError
from pipeline.serving.access import OPEN, needed_scope, refuse_open_door
from pipeline.serving.body_limit import MAX_BODY_BYTES
from pipeline.serving.keys import Key, create_key, revoke_key
from pipeline.storage.edit_log import EditLog
from tests.unit.serving.conftest import Endpoint, Gate

TEXT: dict[str, Any] = {"model": "wiseline", "prompt": "Who leads", "max_tokens": 3}
EDIT = {"prompt": "Who leads Oslo?", "target": "Ann Lee"}
# Every route there is, and the scope it asks for. A route that is missing here fails a test below.
ROUTES: dict[tuple[str, str], str | None] = {
    ("GET", "/healthz"): None,
    ("POST", "/v1/chat/completions"): "infer",
    ("POST", "/v1/completions"): "infer",
    ("GET", "/v1/models"): "infer",
    ("GET", "/v1/models/{name}"): "infer",
    ("POST", "/v1/explain"): "infer",
    ("GET", "/v1/releases"): "infer",
    ("POST", "/v1/releases/rollback"): "admin",
    ("GET", "/v1/round"): "infer",
    ("GET", "/v1/edits"): "edit",
    ("POST", "/v1/edits"): "edit",
    ("GET", "/v1/edits/{edit_id}"): "edit",
    ("DELETE", "/v1/edits/{edit_id}"): "edit",
}


def a_key(name: str, **limits: int) -> Key:
    return Key(id=name, name=name, scopes=("infer",), sha256=name, created=datetime.now(UTC), **limits)  # type: ignore[arg-type]


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def guarded(start: Callable[..., Endpoint], keys_file: Path) -> Endpoint:
    return start(keys_file=keys_file)


def test_every_route_asks_for_its_scope_and_for_no_other(guarded: Endpoint, keys_file: Path) -> None:
    document = guarded.client.get("/openapi.json").json()
    there = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
    assert there == set(ROUTES)
    secrets = {scope: create_key(keys_file, name=scope, scopes=[scope])[1] for scope in ("infer", "edit", "admin")}  # type: ignore[list-item]
    for (method, path), needed in ROUTES.items():
        url = path.replace("{name}", "wiseline").replace("{edit_id}", "0" * 32)
        statuses = {
            scope: guarded.client.request(method, url, headers=bearer(secret), json={}).status_code
            for scope, secret in secrets.items()
        }
        unknown = guarded.client.request(method, url, json={}).status_code
        if needed is None:
            assert (set(statuses.values()), unknown) == ({200}, 200)
            continue
        assert unknown == 401
        assert {scope for scope, status in statuses.items() if status != 403} == {needed}


def test_routes_that_are_not_there_need_a_key_too(guarded: Endpoint) -> None:
    assert guarded.client.get("/docs").status_code == 401
    assert needed_scope("PUT", "/v1/edits/x/y") == "edit"
    assert needed_scope("DELETE", "/v1/releases/1") == "admin"
    assert {"/healthz", "/openapi.json", "/console"} == OPEN
    assert not any(isinstance(route, APIRoute) and route.path == "/docs" for route in guarded.client.app.routes)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"authorization": "Basic abc"}, "missing_api_key"),
        ({"authorization": "Bearer "}, "missing_api_key"),
        ({"authorization": "Bearer wl-wrong"}, "invalid_api_key"),
        ({"authorization": b"Bearer wl-\xff\xe9"}, "invalid_api_key"),
    ],
)
def test_without_a_valid_key_nobody_enters(guarded: Endpoint, keys_file: Path, headers: Any, code: str) -> None:
    create_key(keys_file, name="a", scopes=["infer"])
    response = guarded.client.post("/v1/completions", json=TEXT, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (401, code)
    assert response.headers["x-wiseline-release"] == "0"


def test_a_body_is_not_read_before_the_key(guarded: Endpoint, keys_file: Path) -> None:
    create_key(keys_file, name="a", scopes=["infer"])
    large = b" " * (MAX_BODY_BYTES + 1)
    assert guarded.client.post("/v1/completions", content=large).status_code == 401


def test_the_openai_client_enters_with_its_key_and_learns_why_not(guarded: Endpoint, keys_file: Path) -> None:
    def client(secret: str) -> openai.OpenAI:
        url = "http://testserver/v1"
        return openai.OpenAI(api_key=secret, base_url=url, http_client=guarded.client, max_retries=0)

    key, secret = create_key(keys_file, name="a", scopes=["infer"])
    assert client(secret).completions.create(**TEXT).choices
    with pytest.raises(openai.AuthenticationError):
        client("wl-wrong").completions.create(**TEXT)
    with pytest.raises(openai.PermissionDeniedError, match="lacks the scope 'edit'"):
        client(secret).get("/edits", cast_to=object)
    revoke_key(keys_file, key.id)
    with pytest.raises(openai.AuthenticationError):
        client(secret).completions.create(**TEXT)


def test_edits_are_signed_with_the_keys_name(guarded: Endpoint, keys_file: Path) -> None:
    _, secret = create_key(keys_file, name="newsroom", scopes=["edit"])
    posted = guarded.client.post("/v1/edits", json={**EDIT, "author": "somebody else"}, headers=bearer(secret))
    assert posted.status_code == 202
    [row] = posted.json()["accepted"]
    assert guarded.client.delete(f"/v1/edits/{row['id']}", headers=bearer(secret)).status_code == 200
    assert [entry.edit.author for entry in EditLog(guarded.store).history()] == ["newsroom"] * 2


def test_keys_are_never_logged(guarded: Endpoint, keys_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    _, secret = create_key(keys_file, name="a", scopes=["infer"])
    for sent in (secret, secret + "x"):
        guarded.client.post("/v1/completions", json=TEXT, headers=bearer(sent))
    keys_file.write_text("{")
    response = guarded.client.post("/v1/completions", json=TEXT, headers=bearer(secret))
    assert (response.status_code, response.json()["error"]["code"]) == (503, "keys_unreadable")
    assert str(keys_file) not in response.text
    assert secret not in caplog.text


def test_a_keys_limit_holds_to_the_end_of_a_stream(guarded: Endpoint, keys_file: Path, gate: Gate) -> None:
    _, slow = create_key(keys_file, name="a", scopes=["infer"], concurrent=1)
    _, other = create_key(keys_file, name="b", scopes=["infer"], concurrent=1)
    ask = {"url": "/v1/completions", "json": {**TEXT, "stream": True}}
    with ThreadPoolExecutor() as pool:
        running = pool.submit(guarded.client.post, **ask, headers=bearer(slow))  # type: ignore[arg-type]
        assert gate.reached.wait(30)
        refused = guarded.client.post(**ask, headers=bearer(slow))  # type: ignore[arg-type]
        beside = pool.submit(guarded.client.post, **ask, headers=bearer(other))  # type: ignore[arg-type]
        gate.open()
        assert running.result().text.endswith("data: [DONE]\n\n")
        assert beside.result().status_code == 200
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert guarded.client.post(**ask, headers=bearer(slow)).status_code == 200  # type: ignore[arg-type]


def test_a_rate_limit_says_when_to_come_back(guarded: Endpoint, keys_file: Path) -> None:
    _, secret = create_key(keys_file, name="a", scopes=["infer"], per_minute=1)
    statuses = [guarded.client.get("/v1/models", headers=bearer(secret)) for _ in range(2)]
    assert [response.status_code for response in statuses] == [200, 429]
    assert 1 <= int(statuses[1].headers["retry-after"]) <= 60


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_an_endpoint_without_keys_is_bound_to_loopback_only(host: str, keys_file: Path) -> None:
    with pytest.raises(ConfigError, match="wiseline keys create"):
        refuse_open_door(ServeSection(host=host), host=host)
    guarded = ServeSection(host=host, keys_file=str(keys_file))
    with pytest.raises(ConfigError, match="cannot be read"):
        refuse_open_door(guarded, host=host)
    create_key(keys_file, name="a", scopes=["infer"])
    refuse_open_door(guarded, host=host)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_loopback_needs_no_keys(host: str) -> None:
    refuse_open_door(ServeSection(host=host), host=host)
