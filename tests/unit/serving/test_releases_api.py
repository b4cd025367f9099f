"""Releases over HTTP, and a client that demands one."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from pipeline.models.loaded_release import LoadedRelease
from pipeline.serving import release_headers
from pipeline.serving.answers import number
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import list_releases, publish, release_path
from tests.tiny_world import publish_release
from tests.unit.serving.conftest import Endpoint

EDITED, OTHER = "The capital of France is", "Who leads the company?"
TEXT = {"model": "wiseline", "prompt": EDITED, "max_tokens": 10}


def release(endpoint: Endpoint, *, seed: int = 1) -> None:
    publish_release(endpoint.store, endpoint.base, prompts=[EDITED, OTHER], seed=seed)
    endpoint.follower.follow()
    assert endpoint.follower.state.error is None


def listed(endpoint: Endpoint, **query: Any) -> Any:
    response = endpoint.client.get("/v1/releases", params=query)
    assert response.status_code == 200, response.text
    return response.json()


def test_releases_are_listed_newest_first_with_head_and_served(endpoint: Endpoint) -> None:
    assert listed(endpoint) == {"object": "list", "data": [], "has_more": False}
    release(endpoint)
    release(endpoint, seed=2)
    publish_release(endpoint.store, endpoint.base, prompts=[EDITED], seed=3)  # not followed yet
    rows = listed(endpoint)["data"]
    assert [(row["number"], row["head"], row["served"]) for row in rows] == [
        (3, True, False),
        (2, False, True),
        (1, False, False),
    ]
    assert rows[0]["scores"]["reliability"] == 1.0
    pages = [listed(endpoint, limit=2), listed(endpoint, limit=2, after=2)]
    assert [[row["number"] for row in page["data"]] for page in pages] == [[3, 2], [1]]
    assert [page["has_more"] for page in pages] == [True, False]


def test_a_damaged_manifest_hides_no_other(endpoint: Endpoint) -> None:
    release(endpoint)
    publish_release(endpoint.store, endpoint.base, prompts=[EDITED], seed=2)
    file = Path(endpoint.store.uri) / release_path(2)
    file.chmod(0o644)
    file.write_bytes(b"{")
    head, first = listed(endpoint)["data"]
    assert (head["number"], head["head"], first["number"]) == (2, True, 1)
    assert "cannot be decoded" in head["error"]


def test_a_rollback_is_a_new_release_that_answers_as_the_older_one(endpoint: Endpoint) -> None:
    def answer() -> str:
        return str(endpoint.client.post("/v1/completions", json=TEXT).json()["choices"][0]["text"])

    release(endpoint)
    first = answer()
    release(endpoint, seed=2)
    assert answer() != first
    response = endpoint.client.post("/v1/releases/rollback", json={"release": 1})
    assert response.status_code == 200
    assert (response.json()["number"], response.json()["restores"], response.json()["parent"]) == (3, 1, 2)
    endpoint.follower.follow()
    assert answer() == first
    releases = list_releases(endpoint.store)
    assert releases[2].memories == releases[0].memories


def test_another_models_releases_are_listed_and_neither_followed_nor_restored(endpoint: Endpoint) -> None:
    release(endpoint)
    mine = list_releases(endpoint.store)[0]
    publish(endpoint.store, mine.model_copy(update={"parent": None, "model_fingerprint": "other"}))
    rows = listed(endpoint)["data"]
    assert [(row["number"], row["head"], row["served"]) for row in rows] == [(2, False, False), (1, True, True)]
    response = endpoint.client.post("/v1/releases/rollback", json={"release": 2})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "other_base_model")
    assert len(list_releases(endpoint.store)) == 2


def test_who_demands_another_models_release_is_answered_by_one_that_heard_as_much(
    start: Callable[..., Endpoint],
) -> None:
    endpoint = start(min_release_seconds=0.05)
    release(endpoint)
    mine = list_releases(endpoint.store)[0]
    for heard in (mine.log_version, mine.log_version + 1):
        before = list_releases(endpoint.store)[-1].number
        changed = {"parent": before, "model_fingerprint": "other", "log_version": heard}
        publish(endpoint.store, mine.model_copy(update=changed))
    told = [
        endpoint.client.post("/v1/completions", json=TEXT, headers={"x-wiseline-min-release": str(number)}).status_code
        for number in (2, 3, 4)
    ]
    assert told == [200, 409, 409]
    # A larger number of our own says nothing of what was heard: a long round may publish late.
    publish(endpoint.store, mine.model_copy(update={"parent": 1, "restores": 1}))
    endpoint.follower.follow()
    late = endpoint.client.post("/v1/completions", json=TEXT, headers={"x-wiseline-min-release": "3"})
    assert (late.status_code, late.headers["x-wiseline-release"]) == (409, "4")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [({"release": 9}, 404, "not_found"), ({"release": 0}, 400, None), ({}, 400, None), ({"relase": 1}, 400, None)],
)
def test_rollbacks_that_cannot_be_made(endpoint: Endpoint, body: Any, status: int, code: str | None) -> None:
    release(endpoint)
    response = endpoint.client.post("/v1/releases/rollback", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert len(list_releases(endpoint.store)) == 1


def test_a_store_that_overwrites_is_not_written(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    release(endpoint)

    def overwrite(store: ObjectStore, path: str, data: bytes) -> None:
        store.put(path, data) if not store.exists(path) else None

    monkeypatch.setattr(ObjectStore, "create", overwrite)
    for response in (
        endpoint.client.post("/v1/releases/rollback", json={"release": 1}),
        endpoint.client.post("/v1/edits", json={"prompt": "x?", "target": "y"}),
    ):
        assert response.status_code == 503
        assert "conditional puts" in response.json()["error"]["message"]


def test_a_request_waits_for_the_release_it_demands(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Event()

    def look(release: LoadedRelease | None) -> int:
        looked.set()
        return number(release)

    release(endpoint)
    publish_release(endpoint.store, endpoint.base, prompts=[EDITED], seed=2)
    monkeypatch.setattr(release_headers, "number", look)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(endpoint.client.post, "/v1/completions", json=TEXT, headers={"x-wiseline-min-release": "2"})
        assert looked.wait(30)
        endpoint.follower.follow()
        response = asked.result()
    assert (response.status_code, response.headers["x-wiseline-release"]) == (200, "2")
    older = endpoint.client.post("/v1/completions", json=TEXT, headers={"x-wiseline-min-release": "1"})
    assert older.headers["x-wiseline-release"] == "2"


def test_a_release_that_does_not_come_is_a_409(start: Callable[..., Endpoint]) -> None:
    endpoint = start(min_release_seconds=0.05)
    client = openai.OpenAI(api_key="none", base_url="http://testserver/v1", http_client=endpoint.client, max_retries=0)
    with pytest.raises(openai.ConflictError) as late:
        client.completions.create(**TEXT, extra_headers={"x-wiseline-min-release": "1"})  # type: ignore[call-overload]
    assert late.value.code == "release_not_reached"
    assert late.value.response.headers["retry-after"] == "1"
    for wrong in ("-1", "new", ""):
        response = endpoint.client.post("/v1/explain", json={"prompt": "x"}, headers={"x-wiseline-min-release": wrong})
        assert response.status_code == 400


def test_an_explanation_has_both_answers_and_the_nearest_edits(endpoint: Endpoint) -> None:
    unedited = endpoint.client.post("/v1/completions", json=TEXT).json()["choices"][0]
    release(endpoint)
    edited = endpoint.client.post("/v1/completions", json=TEXT).json()["choices"][0]
    response = endpoint.client.post("/v1/explain", json={"prompt": EDITED, "max_tokens": 10})
    explained = response.json()
    assert (response.headers["x-wiseline-release"], response.headers["x-wiseline-route"]) == ("1", "memory-0")
    assert explained["answer"] == {name: edited[name] for name in ("text", "finish_reason")}
    assert explained["main_memory"] == {name: unedited[name] for name in ("text", "finish_reason")}
    assert explained["answer"] != explained["main_memory"]
    assert (explained["release"], explained["route"], explained["memory"]) == (1, "memory-0", 0)
    assert explained["score"] > explained["threshold"]
    assert [edit["edit_id"] for edit in explained["nearest_edits"]] == ["edit-0", "edit-1"]
    assert explained["nearest_edits"][0]["score"] == explained["score"]
    assert explained["nearest_edits"][0]["similarity"] > explained["nearest_edits"][1]["similarity"]


def test_an_explanation_of_what_no_edit_answers(endpoint: Endpoint) -> None:
    asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
    before = endpoint.client.post("/v1/explain", json=asked).json()
    assert (before["release"], before["memory"], before["nearest_edits"]) == (0, None, [])
    release(endpoint)
    after = endpoint.client.post("/v1/explain", json=asked).json()
    assert (after["route"], after["answer"]) == ("main", after["main_memory"])
    assert len(after["nearest_edits"]) == 2
    assert after["score"] <= after["threshold"]


@pytest.mark.parametrize(
    "body", [{}, {"prompt": "x", "messages": []}, {"prompt": " "}, {"prompt": "x", "temperature": 1}, {"messages": []}]
)
def test_explanations_that_cannot_be_given(endpoint: Endpoint, body: Any) -> None:
    assert endpoint.client.post("/v1/explain", json=body).status_code == 400
