"""What waits: against a plain reading of the same log, and through rounds, rollbacks and live releases."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.edits import Edit
from pipeline.storage.bank import BankEntry
from pipeline.storage.batches import Batch
from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import LivePart, Release, publish, read_release, rollback
from pipeline.training.waiting import decided, waiting

PROMPTS, TARGETS = ("Who leads Oslo?", "Who leads Bergen?", "Who leads Lyon?"), ("Ada", "Bob")
said = st.builds(
    lambda prompt, target: (
        Edit(prompt=prompt, target=target) if target else Edit(op="retract", prompt=prompt)  # an empty slot, or filled
    ),
    st.sampled_from(PROMPTS),
    st.sampled_from([*TARGETS, None]),
)


def entry(edit: Edit) -> BankEntry:
    assert edit.target is not None
    return BankEntry(edit.edit_id, edit.prompt, edit.target, edit.subject, memory=0)


def log_of(folder: Path, edits: list[Edit]) -> EditLog:
    log = EditLog(ObjectStore(str(folder)))
    for number, edit in enumerate(edits):
        log.append(Batch(source=str(number), edits=((0, edit),)))
    return log


@settings(max_examples=25, deadline=None)
@given(edits=st.lists(said, max_size=6), held=st.sets(st.sampled_from(PROMPTS)), heard=st.integers(0, 6))
def test_against_a_plain_reading(
    tmp_path_factory: pytest.TempPathFactory, edits: list[Edit], held: set[str], heard: int
) -> None:
    log = log_of(tmp_path_factory.mktemp("log"), edits)
    bank = [Edit(prompt=prompt, target=TARGETS[0]) for prompt in held]
    newest = {one.edit.slot_id: one for one in log.history()}
    expected = {
        slot
        for slot, one in newest.items()
        if (one.edit.op == "upsert" and one.edit.edit_id not in {edit.edit_id for edit in bank} and one.seq >= heard)
        or (one.edit.op == "retract" and slot in {edit.slot_id for edit in bank})
    }
    rows = log.newest()
    assert set(zip(rows["slot_id"].to_pylist(), rows["seq"].to_pylist(), strict=True)) == {
        (slot, one.seq) for slot, one in newest.items()
    }
    left = waiting(rows, [entry(edit) for edit in bank], decided=heard)
    assert sorted(left["slot_id"].to_pylist()) == sorted(expected)


def test_who_has_decided(store: ObjectStore, tmp_path: Path) -> None:
    log, number = EditLog(store), 0

    def say(*prompts: str) -> int:
        for prompt in prompts:
            log.append(Batch(source=prompt, edits=((0, Edit(prompt=prompt, target="Ada")),)))
        version = log.version()
        assert version is not None
        return version

    def published(version: int, *, round_id: str, live: LivePart | None = None) -> Release:
        nonlocal number
        number += 1
        path = store.put(f"banks/{number}", b"")
        thing = {"path": f"banks/{number}", "sha256": path}
        release = Release(
            number=number, parent=number - 1 or None, round_id=round_id, log_version=version, model_fingerprint="",
            layer=0, memories=(), router=thing, bank=thing, edits=0, live=live,
        )  # fmt: skip
        publish(store, release)
        return release

    assert decided(store, None) == 0
    first = published(say("a", "b"), round_id="one")
    say("c")
    assert decided(store, first) == 2
    # A live release decides on nothing that came in files: the round below it did.
    store.put("rounds/one/20260101T000000000000/report.json", b'{"log_version": %d}' % first.log_version)
    second = published(say("d"), round_id="one", live=LivePart(memories=1, fitted_on=1))
    assert decided(store, second) == 2
    # A rollback is an operator's word on all that was said until then.
    third = rollback(store, 1)
    say("e")
    assert decided(store, read_release(store, third.number)) == 4


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path / "store"))
