"""Edits over HTTP: into the real log, and back out of it."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.edits import Edit
from pipeline.errors import OutcomeUnknown
from pipeline.serving import desk_queue, edits_api
from pipeline.serving.edit_desk import EditDesk, Post
from pipeline.storage import edit_log
from pipeline.storage.batches import Batch
from pipeline.storage.edit_log import EditLog
from tests.tiny_world import publish_release
from tests.unit.serving.conftest import Endpoint

PARIS = {"prompt": "The capital of France is", "target": "Lyon", "subject": "France"}
OSLO = {"prompt": "Who leads Oslo?", "target": "Ann Lee", "subject": "Oslo"}


def post(endpoint: Endpoint, body: Any, *, status: int = 202) -> Any:
    response = endpoint.client.post("/v1/edits", json=body)
    assert response.status_code == status, response.text
    return response.json()


def listed(endpoint: Endpoint, **query: Any) -> Any:
    response = endpoint.client.get("/v1/edits", params=query)
    assert response.status_code == 200, response.text
    return response.json()


def said(endpoint: Endpoint) -> list[tuple[str, str]]:
    return [(entry.edit.prompt, entry.edit.target) for entry in EditLog(endpoint.store).live()]


def test_one_edit_lands_in_the_log(endpoint: Endpoint) -> None:
    told = post(endpoint, PARIS)
    [entry] = EditLog(endpoint.store).live()
    expected = Edit.model_validate(PARIS)
    assert entry.edit == expected
    row = {"row": 0, "id": expected.edit_id, "op": "upsert", "status": "waiting"}
    assert told == {"object": "edits", "new": 1, "unchanged": 0, "live": False, "accepted": [row], "refused": []}


def test_good_rows_land_beside_bad_ones_and_each_bad_one_is_told_why(endpoint: Endpoint) -> None:
    rows = [PARIS, {"prompt": "x"}, "no object", {**OSLO, "paraphrase": ["typo"]}, {**OSLO, "target": 7}, OSLO]
    told = post(endpoint, {"edits": rows})
    assert [row["row"] for row in told["accepted"]] == [0, 5]
    reasons = {row["row"]: row["reason"] for row in told["refused"]}
    assert set(reasons) == {1, 2, 3, 4}
    assert "target is empty" in reasons[1]
    assert "'paraphrase'" in reasons[3]
    assert said(endpoint) == [(PARIS["prompt"], "Lyon"), (OSLO["prompt"], "Ann Lee")]
    assert EditLog(endpoint.store).quarantine() == []


def test_many_edits_are_one_batch(endpoint: Endpoint) -> None:
    post(endpoint, {"edits": [PARIS, OSLO]})
    assert len({entry.batch_id for entry in EditLog(endpoint.store).history()}) == 1


def test_posting_speaks_every_time_and_repeats_nothing(endpoint: Endpoint) -> None:
    """Unlike a file that is read again: an answer that was superseded can be posted back."""
    assert post(endpoint, PARIS)["new"] == 1
    assert (lambda told: (told["new"], told["unchanged"]))(post(endpoint, PARIS)) == (0, 1)
    post(endpoint, {**PARIS, "target": "Nice"})
    assert post(endpoint, PARIS)["new"] == 1
    assert said(endpoint) == [(PARIS["prompt"], "Lyon")]
    assert [entry.edit.target for entry in EditLog(endpoint.store).history()] == ["Lyon", "Nice", "Lyon"]


def test_a_post_of_which_nothing_is_accepted_is_a_422(endpoint: Endpoint) -> None:
    error = post(endpoint, {"prompt": "x"}, status=422)["error"]
    assert (error["code"], error["param"]) == ("edit_refused", "edits")
    assert "the target is empty" in error["message"]
    assert "and 1 more" in post(endpoint, {"edits": [{}, {}]}, status=422)["error"]["message"]
    assert EditLog(endpoint.store).version() is None


@pytest.mark.parametrize("body", [[], [PARIS], "x", {"edits": []}, {"edits": PARIS}, {"edits": [PARIS], "more": 1}])
def test_bodies_that_are_no_edits_are_refused(endpoint: Endpoint, body: Any) -> None:
    assert post(endpoint, body, status=400)["error"]["type"] == "invalid_request_error"


def test_bodies_that_are_not_json_are_refused(endpoint: Endpoint) -> None:
    for headers, content in [
        ({"content-type": "application/json"}, b"{"),
        ({"content-type": "application/json"}, b"[" * 200_000),
        ({"content-type": "text/plain"}, b"{}"),
    ]:
        assert endpoint.client.post("/v1/edits", content=content, headers=headers).status_code == 400
    too_many = {"edits": [PARIS] * 1001}
    assert "at most 1000" in post(endpoint, too_many, status=400)["error"]["message"]


def test_a_retracted_edit_is_gone_from_the_log_and_answers_until_the_next_release(endpoint: Endpoint) -> None:
    first, second = (row["id"] for row in post(endpoint, {"edits": [PARIS, OSLO]})["accepted"])
    response = endpoint.client.delete(f"/v1/edits/{first}")
    expected = {"id": first, "object": "edit", "deleted": True, "served_until_next_release": False}
    assert (response.status_code, response.json()) == (200, expected)
    assert [edit["id"] for edit in listed(endpoint)["data"]] == [second]
    for gone in (first, "0" * 32):
        missing = endpoint.client.delete(f"/v1/edits/{gone}")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


def test_a_superseded_edit_cannot_be_retracted_in_place_of_the_newer_one(endpoint: Endpoint) -> None:
    [older] = post(endpoint, PARIS)["accepted"]
    post(endpoint, {**PARIS, "target": "Nice"})
    assert endpoint.client.delete(f"/v1/edits/{older['id']}").status_code == 404
    assert said(endpoint) == [(PARIS["prompt"], "Nice")]


def test_an_edit_that_is_superseded_while_it_is_retracted_keeps_its_successor(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another replica takes an edit of the slot between this one's look at the log and its commit."""
    [older] = post(endpoint, PARIS)["accepted"]
    commit, elsewhere = edit_log.commit, EditLog(endpoint.store)

    def outrun(*arguments: Any, **keywords: Any) -> None:
        monkeypatch.setattr(edit_log, "commit", commit)
        newer = Edit.model_validate({**PARIS, "target": "Nice"})
        elsewhere.append(Batch(source="elsewhere", edits=((0, newer),)))
        commit(*arguments, **keywords)

    monkeypatch.setattr(edit_log, "commit", outrun)
    assert endpoint.client.delete(f"/v1/edits/{older['id']}").status_code == 404
    assert said(endpoint) == [(PARIS["prompt"], "Nice")]


def test_a_search_finds_words_in_subject_prompt_and_target(endpoint: Endpoint) -> None:
    post(endpoint, {"edits": [PARIS, OSLO]})
    found = {
        query: [edit["target"] for edit in listed(endpoint, query=query)["data"]]
        for query in ("", "FRANCE", "lee  oslo", "capital lyon", "france oslo", "%")
    }
    assert found == {
        "": ["Ann Lee", "Lyon"],
        "FRANCE": ["Lyon"],
        "lee  oslo": ["Ann Lee"],
        "capital lyon": ["Lyon"],
        "france oslo": [],
        "%": [],
    }


def test_pages_hold_every_edit_once_while_others_are_added(endpoint: Endpoint) -> None:
    post(endpoint, {"edits": [{"prompt": f"Question {number}?", "target": f"t{number}"} for number in range(7)]})
    seen, after = [], {}
    while True:
        page = listed(endpoint, limit=3, **after)
        seen += [edit["target"] for edit in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": page["data"][-1]["seq"]}
        post(endpoint, {"prompt": f"Late {len(seen)}?", "target": "late"})
    assert seen == [f"t{number}" for number in reversed(range(7))]


def test_status_says_whether_the_release_in_use_holds_an_edit(endpoint: Endpoint) -> None:
    post(endpoint, {"edits": [PARIS, OSLO]})
    release = publish_release(endpoint.store, endpoint.base, prompts=[PARIS["prompt"]], seed=1)
    endpoint.follower.follow()
    loaded = endpoint.engine.release
    assert loaded is not None and loaded.number == release.number
    # The tiny world names its edits edit-0, edit-1, …; the log knows this one by its content.
    loaded.entry_of[Edit.model_validate(PARIS).edit_id] = loaded.entries[0]
    assert {edit["target"]: edit["status"] for edit in listed(endpoint)["data"]} == {
        "Lyon": "served",
        "Ann Lee": "waiting",
    }
    assert [edit["target"] for edit in listed(endpoint, status="served")["data"]] == ["Lyon"]
    assert [edit["target"] for edit in listed(endpoint, status="waiting")["data"]] == ["Ann Lee"]
    taken = endpoint.client.delete(f"/v1/edits/{Edit.model_validate(PARIS).edit_id}")
    assert taken.json()["served_until_next_release"] is True


def test_the_log_is_read_again_only_when_it_moved(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    history = EditLog.history

    def counted(log: EditLog, version: int | None = None, *, since: int = 0) -> Any:
        reads.append(since)
        return history(log, version, since=since)

    post(endpoint, PARIS)
    monkeypatch.setattr(EditLog, "history", counted)
    for _ in range(3):
        assert len(listed(endpoint)["data"]) == 1
    assert reads == [0]
    EditLog(endpoint.store).retract([Edit.model_validate(PARIS).slot_id])  # somebody else, beside the endpoint
    assert listed(endpoint)["data"] == []
    assert reads == [0, 1]


def test_posts_at_the_same_time_all_land(endpoint: Endpoint) -> None:
    with ThreadPoolExecutor(8) as pool:
        edits = [{"prompt": f"Question {number}?", "target": "t"} for number in range(24)]
        told = list(pool.map(lambda edit: post(endpoint, edit), edits))
    assert all(one["new"] == 1 for one in told)
    assert {prompt for prompt, _ in said(endpoint)} == {edit["prompt"] for edit in edits}


def held_up(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Commits of posts wait: one event says that the first has begun, the other lets them go on."""
    entered, go_on = threading.Event(), threading.Event()
    append = EditLog.append_together

    def slow(log: EditLog, batches: Any) -> Any:
        entered.set()
        assert go_on.wait(30)
        return append(log, batches)

    monkeypatch.setattr(EditLog, "append_together", slow)
    return entered, go_on


def test_posts_that_arrive_together_are_one_commit(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = held_up(monkeypatch)
    left: list[Post] = []
    leave = EditDesk.leave

    def counted(desk: EditDesk, *arguments: Any, **keywords: Any) -> Post:
        left.append(leave(desk, *arguments, **keywords))
        return left[-1]

    monkeypatch.setattr(EditDesk, "leave", counted)
    bodies: list[Any] = [{"prompt": f"Q{number}?", "target": "t"} for number in range(9)]
    bodies += [bodies[0], {"edits": [{"prompt": "x"}, bodies[1]]}]
    with ThreadPoolExecutor(16) as pool:
        first = pool.submit(post, endpoint, PARIS)
        assert entered.wait(30)
        others = [pool.submit(post, endpoint, body) for body in bodies]
        nothing = pool.submit(post, endpoint, {"prompt": "x"}, status=422)
        while len(left) < 13:
            time.sleep(0.01)
        go_on.set()
        told = [one.result() for one in others]
        assert first.result()["new"] == 1
        assert nothing.result()["error"]["code"] == "edit_refused"
    history = EditLog(endpoint.store).history()
    assert sum(one["new"] for one in told) == 9
    assert [len(one["refused"]) for one in told] == [0] * 10 + [1]
    assert sorted(entry.edit.prompt for entry in history) == sorted(
        [PARIS["prompt"], *(b["prompt"] for b in bodies[:9])]
    )
    assert [entry.seq for entry in history] == list(range(10))
    version = EditLog(endpoint.store).version()
    assert version == 2  # made, the first post, all the others


def test_a_post_that_cannot_be_written_is_told_so_and_the_next_one_lands(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(EditLog, "append_together", lambda *_: (_ for _ in ()).throw(OutcomeUnknown("silent")))
        assert endpoint.client.post("/v1/edits", json=PARIS).status_code == 503
    assert post(endpoint, OSLO)["new"] == 1
    assert said(endpoint) == [(OSLO["prompt"], "Ann Lee")]


def test_one_edit_is_waited_for(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    [row] = post(endpoint, PARIS)["accepted"]
    path = f"/v1/edits/{row['id']}"
    waiting = endpoint.client.get(path, params={"wait": 0.05}).json()
    assert (waiting["status"], waiting["release"], waiting["target"]) == ("waiting", 0, "Lyon")
    waits = threading.Event()

    async def sleep(seconds: float) -> None:
        waits.set()
        await asyncio.sleep(seconds)

    monkeypatch.setattr(edits_api, "asyncio", SimpleNamespace(sleep=sleep))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(endpoint.client.get, path, params={"wait": 30})
        assert waits.wait(30)
        publish_release(
            endpoint.store, endpoint.base, prompts=[PARIS["prompt"]], seed=1, edit_ids=[row["id"]], failed=["f" * 32]
        )
        endpoint.follower.follow()
        served = asked.result().json()
    assert (served["status"], served["release"]) == ("served", 1)
    endpoint.client.delete(path)
    assert endpoint.client.get(path).json()["status"] == "leaving"
    publish_release(endpoint.store, endpoint.base, prompts=["other"], seed=2)
    endpoint.follower.follow()
    assert endpoint.client.get(path).status_code == 404


def test_an_edit_that_did_not_come_to_hold_is_said_to_have_failed(endpoint: Endpoint) -> None:
    [row] = post(endpoint, PARIS)["accepted"]
    publish_release(endpoint.store, endpoint.base, prompts=["other"], seed=1, failed=[row["id"]])
    endpoint.follower.follow()
    assert endpoint.client.get(f"/v1/edits/{row['id']}").json()["status"] == "failed"
    assert [edit["id"] for edit in listed(endpoint, status="failed")["data"]] == [row["id"]]


def test_posts_beyond_the_queue_are_told_to_come_back(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the next commit, so many may wait."""
    monkeypatch.setattr(desk_queue, "MOST_POSTS", 32)
    entered, go_on = held_up(monkeypatch)
    with ThreadPoolExecutor(40) as pool:
        first = pool.submit(post, endpoint, PARIS)
        assert entered.wait(30)
        others = [
            pool.submit(endpoint.client.post, "/v1/edits", json={"prompt": f"Q{number}?", "target": "t"})
            for number in range(33)
        ]
        done = as_completed(others)
        refused = [next(done).result() for _ in range(2)]
        go_on.set()
        assert first.result()["new"] == 1
        statuses = [one.result().status_code for one in others]
    assert {(one.status_code, one.headers["retry-after"]) for one in refused} == {(429, "1")}
    assert refused[0].json()["error"]["code"] == "queue_full"
    assert sorted(statuses) == [202] * 31 + [429] * 2
    assert len(said(endpoint)) == 32
