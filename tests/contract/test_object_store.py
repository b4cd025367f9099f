"""What every store promises; `store` comes from the conftest beside this file, or from the one that imports it."""

import functools
import hashlib
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.edits import Edit
from pipeline.errors import AlreadyExists, CorruptObject, NotFound, RoundConflict, StoreError
from pipeline.storage import ranged_file
from pipeline.storage.batches import Batch, Rejection
from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import ObjectRef, Release, head, list_releases, publish, rollback


def test_what_is_put_is_read_back(store: ObjectStore) -> None:
    digest = store.put("rounds/r1/delta.parquet", b"\x00bytes\xff")
    assert digest == hashlib.sha256(b"\x00bytes\xff").hexdigest()
    assert store.read("rounds/r1/delta.parquet", sha256=digest) == b"\x00bytes\xff"


def test_an_object_opens_as_a_file(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranged_file, "READ_AHEAD", 100)
    data = bytes(range(256)) * 4
    store.put("a", data)
    with store.open("a") as file:
        assert file.seek(-3, 2) == 1021
        assert file.read() == data[-3:]
        assert file.seek(5) == 5
        assert [file.read(size) for size in (1, 300, 0, 5000)] == [data[5:6], data[6:306], b"", data[306:]]
    with pytest.raises(NotFound):
        store.open("missing")


def test_reading_checks_the_checksum(store: ObjectStore) -> None:
    store.put("a", b"one")
    with pytest.raises(CorruptObject, match="checksum"):
        store.read("a", sha256=hashlib.sha256(b"two").hexdigest())


def test_a_missing_object_is_not_found(store: ObjectStore) -> None:
    store.put("folder/a", b"")
    for path in ("missing", "folder", "folder/a/b"):
        assert not store.exists(path)
        with pytest.raises(NotFound):
            store.read(path)
        with pytest.raises(NotFound):
            store.modified("missing")


def test_putting_the_same_bytes_again_is_fine_and_other_bytes_are_refused(store: ObjectStore) -> None:
    assert store.put("a", b"one") == store.put("a", b"one")
    with pytest.raises(CorruptObject, match="already holds other bytes"):
        store.put("a", b"two")
    assert store.read("a") == b"one"


def test_creating_again_loses_even_with_the_same_bytes(store: ObjectStore) -> None:
    store.create("releases/1", b"one")
    for again in (b"one", b"two"):
        with pytest.raises(AlreadyExists):
            store.create("releases/1", again)
    assert store.read("releases/1") == b"one"


def test_of_sixteen_creators_one_wins_and_its_bytes_stand(store: ObjectStore) -> None:
    start = threading.Barrier(16)

    def create(index: int) -> int | None:
        start.wait()
        try:
            store.create("race", b"%d" % index)
        except AlreadyExists:
            return None
        return index

    with ThreadPoolExecutor(16) as threads:
        winners = [index for index in threads.map(create, range(16)) if index is not None]
    assert len(winners) == 1
    assert store.read("race") == b"%d" % winners[0]


def test_a_listing_is_sorted_recursive_and_limited_to_its_folder(store: ObjectStore) -> None:
    for path in ("releases/2", "releases/10", "releases/deep/er", "releases-old/1", "rounds/1"):
        store.put(path, b"")
    assert store.list("releases") == ["releases/10", "releases/2", "releases/deep/er"]
    assert store.list("nothing") == []


def test_a_listing_shows_what_was_written_just_before(store: ObjectStore) -> None:
    for number in range(10):
        store.create(f"seen/{number}", b"")
        assert len(store.list("seen")) == number + 1


def test_modified_is_the_time_of_writing(store: ObjectStore) -> None:
    store.put("a", b"")
    assert abs(store.modified("a") - datetime.now(UTC)) < timedelta(minutes=1)


def test_removing_is_repeatable(store: ObjectStore) -> None:
    store.put("a", b"")
    store.remove("a")
    store.remove("a")
    assert not store.exists("a")


def test_the_probe_accepts_and_leaves_nothing(store: ObjectStore) -> None:
    store.probe()
    assert store.list("probe") == []


@pytest.mark.parametrize("path", ["../a", "a/../../b", "/etc/passwd", "", "a//b", "a/./b", "..\\a"])
def test_no_path_leaves_the_store(store: ObjectStore, path: str) -> None:
    for operation in (store.read, store.exists, store.list, store.modified, store.remove):
        with pytest.raises(ValueError, match="not a relative path"):
            operation(path)
    with pytest.raises(ValueError, match="not a relative path"):
        store.create(path, b"")


def test_a_store_travels_to_another_process(store: ObjectStore) -> None:
    store.put("a", b"one")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"one"


def release(store: ObjectStore, parent: Release | None, *, round_id: str = "r") -> Release:
    references = [ObjectRef(path=f"objects/{name}", sha256=store.put(f"objects/{name}", b"")) for name in "mrb"]
    return Release(
        number=parent.number + 1 if parent else 1,
        parent=parent.number if parent else None,
        round_id=round_id,
        log_version=3,
        model_fingerprint="f",
        layer=2,
        memories=(references[0],),
        router=references[1],
        bank=references[2],
        edits=1,
    )


def test_of_eight_publishers_one_wins_and_the_others_are_told(store: ObjectStore) -> None:
    candidates = [release(store, None, round_id=str(index)) for index in range(8)]
    start = threading.Barrier(8)

    def attempt(candidate: Release) -> str | None:
        start.wait()
        try:
            publish(store, candidate)
        except RoundConflict:
            return None
        return candidate.round_id

    with ThreadPoolExecutor(8) as threads:
        winners = [round_id for round_id in threads.map(attempt, candidates) if round_id is not None]
    newest = head(store)
    assert newest is not None
    assert winners == [newest.round_id]


def test_rolling_back_publishes_the_older_memories_and_keeps_history(store: ObjectStore) -> None:
    first = release(store, None, round_id="first")
    publish(store, first)
    second = release(store, first, round_id="second")
    publish(store, second)
    restored = rollback(store, 1)
    assert (restored.number, restored.parent, restored.restores) == (3, 2, 1)
    assert restored.objects == first.objects
    assert list_releases(store) == [first, second, restored]
    assert head(store) == restored


def batch(source: str, *pairs: tuple[str, str]) -> Batch:
    edits = tuple((row, Edit(prompt=prompt, target=target)) for row, (prompt, target) in enumerate(pairs, start=1))
    return Batch(source, edits, (Rejection(99, "broken", source),))


def test_the_edit_log_works_on_this_store(store: ObjectStore) -> None:
    log = EditLog(store)
    assert (log.version(), log.live(), log.quarantine()) == (None, [], [])
    first = batch("a", ("p", "old"), ("q", "kept"))
    log.append(first)
    log.append(batch("b", ("p", "new")))
    version = log.version()
    assert log.append(first).unchanged == 2
    assert EditLog(store).version() == version
    assert [(entry.seq, entry.edit.target) for entry in log.live()] == [(1, "kept"), (2, "new")]
    assert [entry.edit.target for entry in log.history()] == ["old", "kept", "new"]
    assert [entry.edit.target for entry in log.live(1)] == ["old", "kept"]
    assert [source for source, _ in log.quarantine()] == ["a", "b"]


def test_edits_appended_at_the_same_time_are_all_kept_in_one_order(store: ObjectStore) -> None:
    def append(writer: int) -> None:
        log = EditLog(store)
        for number in range(3):
            log.append(batch(f"w{writer}-{number}", (f"p{writer}-{number}", "t"), ("shared", f"{writer}-{number}")))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(append, range(4)))
    entries = EditLog(store).history()
    assert [entry.seq for entry in entries] == list(range(24))
    assert len(EditLog(store).quarantine()) == 12
    shared = [entry.edit.target for entry in entries if entry.edit.prompt == "shared"]
    for writer in range(4):
        mine = [target for target in shared if target.startswith(f"{writer}-")]
        assert mine == sorted(mine)
    assert [entry.edit.target for entry in EditLog(store).live() if entry.edit.prompt == "shared"] == shared[-1:]


def test_a_bucket_that_is_not_there_is_a_sentence(store: ObjectStore) -> None:
    if not store.uri.startswith("s3://"):
        pytest.skip("a folder is made when it is needed")
    elsewhere = ObjectStore("s3://there-is-no-such-bucket/prefix", s3_endpoint_url=store.s3_endpoint_url)
    for operation in (
        elsewhere.probe,
        functools.partial(elsewhere.read, "a"),
        functools.partial(EditLog(elsewhere).append, batch("a", ("p", "t"))),
    ):
        with pytest.raises(NotFound, match="bucket"):
            operation()
    with pytest.raises(StoreError):
        EditLog(elsewhere).version()
