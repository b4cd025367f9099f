"""How far a round is, by what it has left in the store. Outcomes are written by hand, plans by the real planner."""

import json
import os
import time
from pathlib import Path

import pytest

from pipeline.errors import CorruptObject
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import ObjectRef, OfModel, Release, publish, rollback
from pipeline.training.planning import Plan
from pipeline.training.round_state import look_at_rounds, write_plan
from pipeline.training.shard_files import FILES, shard_path
from tests.unit.training.test_planning import CAPACITY, Edit, plan

MINE, OTHER = OfModel("f", 1), OfModel("g", 1)  # plans of test_planning are of the first


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path))


def a_plan(edits: int) -> Plan:
    return plan([Edit(prompt=f"question {index}", target="answer") for index in range(edits)])


def at(store: ObjectStore, path: str, *, seconds_ago: float) -> None:
    moment = time.time() - seconds_ago
    os.utime(Path(store.uri) / path, (moment, moment))


def report(
    store: ObjectStore, round_id: str, *, stamp: str = "20261121T020000000000", model: OfModel | None = None
) -> str:
    of = {"model": {"fingerprint": model.fingerprint, "layer": model.layer}} if model else {}
    store.put(f"rounds/{round_id}/{stamp}/report.json", json.dumps(of).encode())
    store.put(f"rounds/{round_id}/{stamp}/report.html", b"")
    return f"rounds/{round_id}/{stamp}/report.json"


def release(store: ObjectStore, number: int, round_id: str, *, model: OfModel | None = None) -> None:
    there = ObjectRef(path="there", sha256=store.put("there", b""))
    of = {"model_fingerprint": model.fingerprint if model else "f", "layer": 1}
    parts = {"memories": (there,), "router": there, "bank": there, "edits": 1, **of}
    publish(store, Release(number=number, parent=number - 1 or None, round_id=round_id, log_version=1, **parts))


def test_before_the_first_round_there_is_none(store: ObjectStore) -> None:
    assert look_at_rounds(store) == (None, None)


def test_shards_go_from_waiting_over_extracted_to_trained(store: ObjectStore) -> None:
    planned = a_plan(CAPACITY + 1)
    write_plan(store, planned)
    places = [
        (memory, shard.index, len(shard.edits)) for memory, m in enumerate(planned.memories) for shard in m.shards
    ]
    first, second = planned.memories[0].shards[:2]
    for name in FILES:
        store.put(shard_path(first.digest, name), b"x")
    for name in ("keys", "states"):
        store.put(shard_path(second.digest, name), b"x")
    store.put(shard_path(planned.memories[1].shards[0].digest, "keys"), b"x")
    running, last = look_at_rounds(store)
    assert running is not None and last is None
    assert [(seen.memory, seen.shard, seen.edits) for seen in running.shards] == places == [
        (0, 0, 2), (0, 1, 2), (0, 2, 2), (1, 0, 1)
    ]  # fmt: skip
    assert [seen.state for seen in running.shards] == ["trained", "extracted", "waiting", "waiting"]


def test_news_are_the_newest_file_of_a_shard_and_not_another_rounds(store: ObjectStore) -> None:
    planned = a_plan(CAPACITY)
    write_plan(store, planned)
    at(store, f"rounds/{planned.round_id}/plan.json", seconds_ago=3600)
    store.put(shard_path("of-another-round", "delta"), b"x")
    for ago, shard in zip((40, 50), planned.memories[0].shards, strict=False):
        store.put(shard_path(shard.digest, "keys"), b"x")
        at(store, shard_path(shard.digest, "keys"), seconds_ago=ago)
    running, _ = look_at_rounds(store)
    assert running is not None
    assert 3500 < time.time() - running.began.timestamp() < 3700
    assert 40 <= time.time() - running.news.timestamp() < 49


def test_a_round_with_a_report_has_ended(store: ObjectStore) -> None:
    planned = a_plan(2)
    write_plan(store, planned)
    report(store, planned.round_id)
    running, last = look_at_rounds(store)
    assert running is None and last is not None
    assert (last.round_id, last.missed) == (planned.round_id, False)
    store.put(f"rounds/{planned.round_id}/missed.json", b"{}")
    _, last = look_at_rounds(store)
    assert last is not None and last.missed


def test_the_newest_report_is_the_last_round(store: ObjectStore) -> None:
    report(store, "later", stamp="20261121T020000000000")
    report(store, "earlier", stamp="20261120T020000000000")
    _, last = look_at_rounds(store)
    assert last is not None and last.round_id == "later"


def test_what_was_given_up_before_the_last_round_does_not_run(store: ObjectStore) -> None:
    given_up, next_one = a_plan(2), a_plan(3)
    write_plan(store, given_up)
    at(store, f"rounds/{given_up.round_id}/plan.json", seconds_ago=7200)
    at(store, report(store, "ended"), seconds_ago=3600)
    assert look_at_rounds(store)[0] is None
    write_plan(store, next_one)
    running, _ = look_at_rounds(store)
    assert running is not None and running.round_id == next_one.round_id


def test_a_round_that_was_killed_between_release_and_report_does_not_run(store: ObjectStore) -> None:
    planned = a_plan(2)
    write_plan(store, planned)
    release(store, 1, planned.round_id)
    assert look_at_rounds(store)[0] is None
    rollback(store, 1)
    assert look_at_rounds(store)[0] is None


def test_a_miss_is_its_own_models(store: ObjectStore) -> None:
    report(store, "mine", stamp="20261121T020000000000", model=MINE)
    store.put("rounds/mine/missed.json", b"{}")
    report(store, "other", stamp="20261121T030000000000", model=OTHER)
    for model, round_id, missed in ((MINE, "mine", True), (OTHER, "other", False), (None, "other", False)):
        for _ in range(2):  # what is known of a report is remembered
            last = look_at_rounds(store, model)[1]
            assert last is not None and (last.round_id, last.missed) == (round_id, missed)
    report(store, "old", stamp="20261121T040000000000")  # does not say whose it is
    last = look_at_rounds(store, MINE)[1]
    assert last is not None and last.round_id == "old"


def test_another_models_round_that_ended_or_runs_does_not_hide_mine(store: ObjectStore) -> None:
    planned = a_plan(2)
    write_plan(store, planned)
    at(store, f"rounds/{planned.round_id}/plan.json", seconds_ago=7200)
    at(store, report(store, "other", model=OTHER), seconds_ago=3600)
    running, last = look_at_rounds(store, MINE)
    assert running is not None and running.round_id == planned.round_id and last is None
    running, last = look_at_rounds(store, OTHER)
    assert running is None and last is not None
    store.put("rounds/another/plan.json", b'{"model": {"fingerprint": "g", "layer": 1}, "memories": []}')
    running, _ = look_at_rounds(store, MINE)
    assert running is not None and running.round_id == planned.round_id
    running, _ = look_at_rounds(store, OTHER)
    assert running is not None and running.round_id == "another"


def test_a_round_that_was_killed_after_its_release_does_not_run_under_another_models_release(
    store: ObjectStore,
) -> None:
    planned = a_plan(2)
    write_plan(store, planned)
    release(store, 1, planned.round_id)
    release(store, 2, "other", model=OTHER)
    assert look_at_rounds(store, MINE)[0] is None


@pytest.mark.parametrize("damaged", [b"{", b"[]", json.dumps({"memories": [{"shards": [{}]}]}).encode()])
def test_a_damaged_plan_is_named(store: ObjectStore, damaged: bytes) -> None:
    store.put("rounds/abc/plan.json", damaged)
    with pytest.raises(CorruptObject, match=r"rounds/abc/plan\.json"):
        look_at_rounds(store)
