"""What the steps of a round leave each other: what can no longer be used is not found, and makes room."""

from pathlib import Path

import pytest

from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import ObjectRef, Release
from pipeline.training.round_records import find_candidate, keep_candidate


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path / "store"))


def candidate(store: ObjectStore, name: str) -> Release:
    stored = ObjectRef(path=name, sha256=store.put(name, name.encode()))
    return Release(
        number=1, parent=None, round_id="0a", log_version=1, model_fingerprint="9f", layer=0, memories=(),
        router=stored, bank=stored, edits=1,
    )  # fmt: skip


def test_of_two_candidates_the_first_stays_while_its_objects_are_there(store: ObjectStore) -> None:
    first, second = candidate(store, "banks/a"), candidate(store, "banks/b")
    for release in (first, second):
        keep_candidate(store, release, {})
    assert find_candidate(store, "0a") == (first, {})
    store.remove("banks/a")
    assert find_candidate(store, "0a") is None
    keep_candidate(store, second, {"made": "again"})
    assert find_candidate(store, "0a") == (second, {"made": "again"})
