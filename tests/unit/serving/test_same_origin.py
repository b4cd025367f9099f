"""An endpoint without keys and the pages of other sites: foreign names and origins are refused before all else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.serving.keys import create_key
from pipeline.serving.same_origin import host_name
from pipeline.storage.edit_log import EditLog
from tests.unit.serving.conftest import Endpoint

EDIT = {"prompt": "Who leads Oslo?", "target": "Ann Lee"}


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "[::1]", "testserver:1"]
)
def test_its_own_names_enter(endpoint: Endpoint, host: str) -> None:
    for origin in ({}, {"origin": f"http://{host}"}, {"origin": f"https://{host}"}):
        assert endpoint.client.get("/v1/models", headers={"host": host, **origin}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "", "[",
     "a@b:c", "0.0.0.0:8000", "localhost@evil.example", "evil.example#localhost"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/healthz", "/openapi.json", "/console"])
def test_other_names_do_not(endpoint: Endpoint, host: str, path: str) -> None:
    refused = endpoint.client.get(path, headers={"host": host})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "foreign_host")


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "", "http://testserver.evil.example", "http://testserver:81", "file://testserver",
     "http://localhost", "http://testserver, http://evil.example"],
)  # fmt: skip
def test_what_another_sites_page_posts_changes_nothing(endpoint: Endpoint, origin: str) -> None:
    """Also not with a body that a browser sends without asking first: a form's, or text."""
    for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
        headers = {"origin": origin, "content-type": kind}
        refused = endpoint.client.post("/v1/edits", json=EDIT, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "foreign_origin")
    assert EditLog(endpoint.store).version() is None
    assert "access-control-allow-origin" not in refused.headers


def test_with_keys_any_name_and_origin_may_come_and_the_key_decides(
    start: Callable[..., Endpoint], tmp_path: Path
) -> None:
    _, secret = create_key(tmp_path / "keys.json", name="a", scopes=["infer"])
    guarded = start(keys_file=tmp_path / "keys.json")
    foreign = {"host": "wiseline.example", "origin": "https://app.example"}
    assert guarded.client.get("/v1/models", headers=foreign).status_code == 401
    allowed = guarded.client.get("/v1/models", headers={**foreign, "authorization": f"Bearer {secret}"})
    assert allowed.status_code == 200


@pytest.mark.parametrize(
    ("authority", "name"),
    [("A.example:80", "a.example"), ("[::1]:8000", "::1"), ("", ""), ("[::1", ""), ("127.0.0.1", "127.0.0.1")],
)
def test_the_name_in_a_host_header(authority: str, name: str) -> None:
    assert host_name(authority) == name
