"""What a replica tells of store and engine while nothing happens."""

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.edits import Edit
from pipeline.errors import CorruptObject
from pipeline.metrics import METRICS
from pipeline.serving import standing
from pipeline.serving.standing import Standing
from pipeline.storage.batches import Batch, Rejection
from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import release_path
from tests.tiny_world import publish_release

EDITS = tuple(Edit(prompt=f"Who leads company {name}?", target="Ada") for name in "abc")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The last value of each gauge, by its name and label."""
    values: dict[str, Any] = {}

    def record(name: str, value: float = 1.0, **labels: str) -> None:
        assert set(labels) == set(METRICS[name].labels)
        values[name.removeprefix("wiseline_") + "".join(f":{label}" for label in labels.values())] = value

    monkeypatch.setattr(standing, "record", record)
    return values


def test_the_story_of_a_store(start: Callable[..., Any], told: dict[str, Any]) -> None:
    endpoint = start()
    here = Standing(endpoint.store, endpoint.engine)

    def look() -> None:
        here.look()
        here.tell()

    look()
    expected = {"edits_living": 0, "edits_waiting": 0, "edits_waiting_seconds": 0, "head_release": 0, "release": 0}
    assert expected.items() <= told.items()
    assert not {"release_age_seconds", "last_round_age_seconds"} & told.keys()  # there is none

    rejections = (Rejection(row=4, reason="the target is empty", raw="{}"),)
    log = EditLog(endpoint.store)
    log.append(Batch(source="edits.jsonl", edits=tuple(enumerate(EDITS[:2])), rejections=rejections))
    look()
    assert (told["edits_living"], told["edits_waiting"], told["quarantined_rows"], told["log_entries"]) == (2, 2, 1, 2)
    assert 0 < told["edits_waiting_seconds"] < 600

    publish(endpoint)
    look()
    assert (told["head_release"], told["release"], told["edits_waiting"]) == (1, 0, 2)  # published, and not swapped in
    endpoint.follower.follow()
    look()
    assert (told["release"], told["edits_waiting"], told["edits_waiting_seconds"]) == (1, 0, 0)
    assert 0 <= told["release_age_seconds"] < 600

    log.append(Batch(source="more.jsonl", edits=((0, EDITS[2]),)))
    log.retract([EDITS[0].slot_id])
    look()
    assert (told["edits_living"], told["edits_waiting"], told["log_entries"]) == (2, 2, 4)


def test_a_damaged_head_is_ahead_of_the_replica_and_hides_nothing_else(
    start: Callable[..., Any], told: dict[str, Any]
) -> None:
    endpoint = start()
    publish(endpoint)
    endpoint.follower.follow()
    look = Standing(endpoint.store, endpoint.engine).look
    look()
    publish(endpoint)
    manifest = Path(endpoint.store.uri) / release_path(2)
    whole = manifest.read_bytes()
    manifest.chmod(0o644)
    manifest.write_bytes(b"{")
    EditLog(endpoint.store).append(Batch(source="more.jsonl", edits=((0, EDITS[2]),)))
    look()
    assert (told["head_release"], told["edits_living"]) == (2, 1)

    manifest.write_bytes(whole)
    look()
    assert told["head_release"] == 2


def test_one_part_that_is_damaged_does_not_hide_the_next(
    start: Callable[..., Any], told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = start()
    look = Standing(endpoint.store, endpoint.engine).look

    def damaged(log: EditLog) -> int:
        raise CorruptObject("quarantine is damaged")

    monkeypatch.setattr(EditLog, "quarantined", damaged)
    with pytest.raises(CorruptObject, match="quarantine is damaged"):
        look()
    assert told["round_running"] is False


def test_how_long_the_store_is_silent(
    start: Callable[..., Any], told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(standing, "monotonic", lambda: clock[0])
    endpoint = start()
    here = Standing(endpoint.store, endpoint.engine)

    def silent_seconds() -> float:
        here.tell()
        return float(told["store_silent_seconds"])

    clock[0] += 5
    assert silent_seconds() == 5  # it has read nothing yet
    here.look()
    clock[0] += 7
    assert silent_seconds() == 7
    with monkeypatch.context() as patched:
        patched.setattr(EditLog, "version", unreadable)
        with pytest.raises(CorruptObject):
            here.look()
        assert silent_seconds() == 7
    here.look()
    assert silent_seconds() == 0


def unreadable(log: EditLog) -> int:
    raise CorruptObject("The log is damaged.")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_look_that_does_not_end_hides_nothing_that_needs_no_store(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = start()
    looking, told, over = threading.Event(), threading.Event(), threading.Event()

    def stuck(store: ObjectStore) -> list[int]:
        looking.set()
        over.wait()
        raise SystemExit  # ends its thread

    def record(name: str, value: float = 1.0, **_: str) -> None:
        if over.is_set():
            raise SystemExit
        if name == "wiseline_store_silent_seconds" and looking.is_set():
            told.set()

    monkeypatch.setattr(standing, "release_numbers", stuck)
    monkeypatch.setattr(standing, "record", record)
    monkeypatch.setattr(standing, "LOOK_SECONDS", 0.01)
    before = set(threading.enumerate())
    Standing(endpoint.store, endpoint.engine).start()
    try:
        assert told.wait(60)
    finally:
        over.set()
        for one in set(threading.enumerate()) - before:
            one.join(60)


def publish(endpoint: Any) -> None:
    """A release that holds the first two edits."""
    prompts, ids = [edit.prompt for edit in EDITS[:2]], [edit.edit_id for edit in EDITS[:2]]
    publish_release(endpoint.store, endpoint.base, prompts=prompts, seed=1, edit_ids=ids)


def test_rounds_that_run_and_that_ended(start: Callable[..., Any], told: dict[str, Any]) -> None:
    endpoint = start()
    look = Standing(endpoint.store, endpoint.engine).look
    plan = {"memories": [{"shards": [{"digest": "a", "edits": ["x"]}, {"digest": "b", "edits": []}]}]}
    endpoint.store.put("rounds/one/plan.json", json.dumps(plan).encode())
    for name in ("keys", "states"):
        endpoint.store.put(f"shards/a/{name}.parquet", b"")
    look()
    assert (told["round_running"], told["round_shards:waiting"], told["round_shards:extracted"]) == (True, 1, 1)

    now = datetime.now(UTC)
    ended(endpoint, now, {"train": 5.0, "polish": 2.0})
    look()
    assert (told["round_running"], told["round_silent_seconds"], told["round_shards:waiting"]) == (False, 0, 0)
    assert (told["last_round_missed"], told["last_round_phase_seconds:train"]) == (False, 5.0)
    ended(endpoint, now + timedelta(seconds=1), {"train": 6.0})
    endpoint.store.put("rounds/one/missed.json", b"{}")
    look()
    assert told["last_round_missed"] is True
    phases = (told["last_round_phase_seconds:train"], told["last_round_phase_seconds:polish"])
    assert phases == (6.0, 0.0)  # a phase that is not there any more takes no time


def ended(endpoint: Any, moment: datetime, seconds: dict[str, float]) -> None:
    path = f"rounds/one/{moment:%Y%m%dT%H%M%S%f}/report.json"
    endpoint.store.put(path, json.dumps({"seconds": seconds}).encode())


def test_every_gauge_of_a_replica_is_told(start: Callable[..., Any], told: dict[str, Any]) -> None:
    endpoint = start()
    publish(endpoint)
    ended(endpoint, datetime.now(UTC), {"train": 5.0})
    here = Standing(endpoint.store, endpoint.engine)
    here.tell()
    here.look()
    gauges = {name for name, metric in METRICS.items() if (metric.kind, metric.reporter) == ("gauge", "replica")}
    assert {f"wiseline_{name.partition(':')[0]}" for name in told} == gauges
