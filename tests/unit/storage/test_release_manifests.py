import hashlib
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.errors import CorruptObject, NewerSchema, NotFound, OutcomeUnknown, RoundConflict
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import (
    ObjectRef,
    OfModel,
    Release,
    encode_release,
    head,
    list_releases,
    newest_of_a_round,
    publish,
    published_as,
    read_release,
    release_path,
    rollback,
)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path / "store"))


def reference(name: str) -> ObjectRef:
    return ObjectRef(path=f"objects/{name}", sha256=hashlib.sha256(name.encode()).hexdigest())


def release(store: ObjectStore, number: int = 1, **changed: object) -> Release:
    for name in ("memory", "router", "bank"):
        store.put(f"objects/{name}", name.encode())
    fields: dict[str, object] = {
        "number": number,
        "parent": number - 1 or None,
        "round_id": "r",
        "log_version": 4,
        "model_fingerprint": "f",
        "layer": 1,
        "memories": (reference("memory"),),
        "router": reference("router"),
        "bank": reference("bank"),
        "edits": 2,
        "scores": {"reliability": 1.0},
    }
    return Release.model_validate(fields | changed)


def test_before_the_first_release_there_is_no_head(store: ObjectStore) -> None:
    assert head(store) is None
    assert list_releases(store) == []
    with pytest.raises(NotFound, match="nothing is published yet"):
        read_release(store, 1)


def test_the_largest_number_is_the_head(store: ObjectStore) -> None:
    for number in range(1, 12):
        publish(store, release(store, number))
    newest = head(store)
    assert newest is not None
    assert newest.number == 11
    assert [one.number for one in list_releases(store)] == list(range(1, 12))
    with pytest.raises(NotFound, match="there are 1 to 11"):
        read_release(store, 12)


def test_a_manifest_is_a_function_of_the_release_and_carries_no_time(store: ObjectStore) -> None:
    one = release(store, scores={"b": 0.5, "a": 1.0})
    assert encode_release(one) == encode_release(release(store, scores={"a": 1.0, "b": 0.5}))
    publish(store, one)
    assert store.read(release_path(1)) == encode_release(one)
    assert read_release(store, 1) == one


def test_publishing_on_an_old_parent_conflicts_and_changes_nothing(store: ObjectStore) -> None:
    publish(store, release(store, 1))
    publish(store, release(store, 2))
    for stale in (release(store, 1), release(store, 2), release(store, 2, parent=None), release(store, 4)):
        with pytest.raises(RoundConflict, match="run the round again"):
            publish(store, stale)
    assert len(list_releases(store)) == 2


def of(store: ObjectStore, fingerprint: str, parent: int | None) -> Release:
    return release(store, parent=parent, model_fingerprint=fingerprint)


def test_releases_of_two_models_share_the_numbers_and_each_has_its_head(store: ObjectStore) -> None:
    first, other = OfModel("f", 1), OfModel("g", 1)
    publish(store, of(store, "f", None))
    publish(store, of(store, "g", None))
    second = publish(store, of(store, "f", 1))
    assert (second.number, second.parent) == (3, 1)
    assert (head(store, first), head(store, other)) == (second, read_release(store, 2))
    assert head(store, OfModel("f", 0)) is None
    assert head(store) == second
    with pytest.raises(RoundConflict, match="Release 3 was published"):
        publish(store, of(store, "f", 1))
    assert publish(store, of(store, "g", 2)).number == 4
    back = rollback(store, 1)
    assert (back.number, back.restores, head(store, first), head(store, other)) == (5, 1, back, read_release(store, 4))
    assert newest_of_a_round(store, first) == second


def test_who_loses_the_number_to_another_model_takes_the_next_one(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, ours = store.create, of(store, "f", None)

    def beaten(path: str, data: bytes) -> None:
        monkeypatch.setattr(store, "create", create)
        publish(store, of(store, "g", None))
        create(path, data)

    monkeypatch.setattr(store, "create", beaten)
    assert publish(store, ours).number == 2
    assert [one.model_fingerprint for one in list_releases(store)] == ["g", "f"]


def test_another_models_manifest_is_read_once(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for parent in (None, 1, 2):
        publish(store, of(store, "g", parent))
    model, read = OfModel("f", 1), store.read
    assert head(store, model) is None
    paths: list[str] = []
    monkeypatch.setattr(store, "read", lambda path, **rest: paths.append(path) or read(path, **rest))
    assert head(store, model) is None
    assert paths == []


def test_what_landed_unheard_is_found_under_its_number(store: ObjectStore) -> None:
    publish(store, of(store, "g", None))
    ours = of(store, "f", None)
    assert published_as(store, ours) is None
    landed = publish(store, ours)
    publish(store, of(store, "f", landed.number))
    assert published_as(store, ours) == landed
    assert published_as(store, ours.model_copy(update={"edits": 9})) is None


def test_a_release_is_not_published_before_everything_it_names_is_stored(store: ObjectStore) -> None:
    with pytest.raises(NotFound, match="objects/other"):
        publish(store, release(store, memories=(reference("memory"), reference("other"))))
    assert head(store) is None


def test_a_crash_before_the_manifest_leaves_the_last_head(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, release(store, 1))
    second = release(store, 2)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.link", crash)
        with pytest.raises(KeyboardInterrupt):
            publish(store, second)
    newest = head(store)
    assert newest is not None
    assert newest.number == 1
    publish(store, second)
    assert [one.number for one in list_releases(store)] == [1, 2]


def test_an_unknown_outcome_reaches_the_caller_and_the_head_says_what_happened(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store.create

    def lose_the_answer(path: str, data: bytes) -> None:
        real(path, data)
        raise OutcomeUnknown("silence")

    monkeypatch.setattr(store, "create", lose_the_answer)
    one = release(store)
    with pytest.raises(OutcomeUnknown):
        publish(store, one)
    assert head(store) == one


def test_rolling_back_to_a_release_whose_objects_are_gone_publishes_nothing(store: ObjectStore) -> None:
    store.put("objects/old", b"old")
    publish(store, release(store, 1, memories=(reference("old"),)))
    publish(store, release(store, 2))
    store.remove("objects/old")
    with pytest.raises(NotFound, match="objects/old"):
        rollback(store, 1)
    with pytest.raises(NotFound, match="no release 7"):
        rollback(store, 7)
    assert len(list_releases(store)) == 2


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"schema_version": 1}', b"\xff"])
def test_a_damaged_manifest_is_a_sentence(store: ObjectStore, data: bytes) -> None:
    store.create(release_path(1), data)
    with pytest.raises(CorruptObject, match="Release 1"):
        head(store)


def test_a_manifest_under_another_number_is_corrupt(store: ObjectStore) -> None:
    store.create(release_path(2), encode_release(release(store, 1)))
    with pytest.raises(CorruptObject, match="calls itself 1"):
        head(store)


def test_a_manifest_of_a_newer_wiseline_is_refused(store: ObjectStore) -> None:
    data = encode_release(release(store)).replace(b'"schema_version": 3', b'"schema_version": 4, "news": 1')
    store.create(release_path(1), data)
    with pytest.raises(NewerSchema, match="upgrade wiseline"):
        head(store)


def test_other_files_among_the_releases_are_not_releases(store: ObjectStore) -> None:
    publish(store, release(store, 1))
    for name in ("releases/note.txt", "releases/2.json", "releases/old/00000009.json"):
        store.put(name, b"?")
    newest = head(store)
    assert newest is not None
    assert newest.number == 1


def test_a_manifest_names_nothing_outside_the_store_and_no_score_that_is_not_a_number(store: ObjectStore) -> None:
    with pytest.raises(ValidationError):
        ObjectRef(path="../secret", sha256="x")
    with pytest.raises(ValidationError):
        release(store, scores={"reliability": float("nan")})
