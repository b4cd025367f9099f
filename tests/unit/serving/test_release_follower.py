"""The follower over a real store with real releases, some of them damaged."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import load_config
from pipeline.errors import StoreError
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.loaded_release import LoadedRelease
from pipeline.serving import release_follower
from pipeline.serving.release_follower import FALLBACKS, OTHERS_ALONE, FollowerState, ReleaseFollower
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import Release, release_path, rollback
from tests.tiny_world import publish_release, save_model

PROMPTS = ["The capital of France is"]


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path / "store"))


@pytest.fixture
def swapped() -> list[LoadedRelease]:
    return []


@pytest.fixture
def follower(store: ObjectStore, base: BaseModel, swapped: list[LoadedRelease]) -> ReleaseFollower:
    return ReleaseFollower(store, base, swapped.append, poll_seconds=3600)


def publish(store: ObjectStore, base: BaseModel, *, seed: int = 1) -> Release:
    return publish_release(store, base, prompts=PROMPTS, seed=seed)


def damage(store: ObjectStore, path: str) -> bytes:
    """Flip one byte of a stored object; returns what it held."""
    file = Path(store.uri) / path
    data = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    return data


def numbers(swapped: list[LoadedRelease]) -> list[int | None]:
    return [release.number for release in swapped]


def test_nothing_published_is_no_error(follower: ReleaseFollower, swapped: list[LoadedRelease]) -> None:
    follower.follow()
    assert swapped == []
    assert follower.state.error is None


def test_each_release_is_taken_once(
    follower: ReleaseFollower, store: ObjectStore, base: BaseModel, swapped: list[LoadedRelease]
) -> None:
    publish(store, base)
    follower.follow()
    follower.follow()
    publish(store, base)
    publish(store, base)
    follower.follow()
    rollback(store, 1)
    follower.follow()
    assert numbers(swapped) == [1, 3, 4]


@pytest.mark.parametrize("part", ["memories", "router", "bank", "manifest"])
def test_a_damaged_release_keeps_the_old_one_until_it_is_restored(
    follower: ReleaseFollower, store: ObjectStore, base: BaseModel, swapped: list[LoadedRelease], part: str
) -> None:
    publish(store, base)
    follower.follow()
    release = publish(store, base, seed=2)  # a memory that the first release does not have
    path = {
        "memories": release.memories[0].path,
        "router": release.router.path,
        "bank": release.bank.path,
        "manifest": release_path(release.number),
    }[part]
    data = damage(store, path)
    follower.follow()
    assert numbers(swapped) == [1]
    assert follower.state.release == 1
    assert follower.state.error is not None
    assert "Release 2 is not used" in follower.state.error
    (Path(store.uri) / path).write_bytes(data)
    follower._next_attempt = 0  # the pause before the next attempt is over
    follower.follow()
    assert numbers(swapped) == [1, 2]
    assert follower.state.error is None


def test_a_memory_that_stays_is_held_once(
    follower: ReleaseFollower, store: ObjectStore, base: BaseModel, swapped: list[LoadedRelease]
) -> None:
    for seed in (1, 1, 2):
        publish(store, base, seed=seed)
        follower.follow()
    first, same, other = (release.memories[0] for release in swapped)
    assert first is same
    assert not torch.equal(first, other)


def test_the_next_release_does_not_wait_for_the_pause_of_a_damaged_one(
    follower: ReleaseFollower, store: ObjectStore, base: BaseModel, swapped: list[LoadedRelease]
) -> None:
    damage(store, publish(store, base).bank.path)
    follower.follow()
    publish(store, base)
    follower.follow()
    assert numbers(swapped) == [2]
    assert follower.state.error is None


def test_a_release_and_what_is_wrong_are_told_at_once(store: ObjectStore, base: BaseModel) -> None:
    """Who waits for a release must not read the error of the one before it."""
    told: list[Any] = []

    class Watched(ReleaseFollower):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if name == "state":
                told.append((self.state.release, self.state.error is None))

    follower = Watched(store, base, lambda _: told.append("swapped"), poll_seconds=3600)
    damage(store, publish(store, base).bank.path)
    follower.follow()
    publish(store, base)
    follower.follow()
    assert told == [(0, True), (0, False), (2, True), "swapped"]


def test_a_damaged_head_is_not_read_at_every_poll(
    follower: ReleaseFollower, store: ObjectStore, base: BaseModel, swapped: list[LoadedRelease]
) -> None:
    release = publish(store, base)
    data = damage(store, release.bank.path)
    follower.follow()
    (Path(store.uri) / release.bank.path).write_bytes(data)
    follower.follow()
    assert swapped == []


def test_a_replica_that_starts_beside_a_damaged_head_takes_the_release_before_it(
    follower: ReleaseFollower, store: ObjectStore, base: BaseModel, swapped: list[LoadedRelease]
) -> None:
    publish(store, base)
    damage(store, publish(store, base).memories[0].path)
    follower.follow()
    assert numbers(swapped) == [1]
    assert follower.state.error is not None


@pytest.fixture
def other(tmp_path: Path) -> BaseModel:
    folder = save_model(tmp_path / "other", seed=9)
    return load_base_model(load_config(overrides=[f"model.path={folder}"]).model)


def test_releases_of_another_model_are_not_followed(
    follower: ReleaseFollower, store: ObjectStore, base: BaseModel, other: BaseModel, swapped: list[LoadedRelease]
) -> None:
    publish(store, other)
    follower.follow()
    assert swapped == []
    assert follower.state.error == OTHERS_ALONE
    publish(store, base)
    for seed in range(2 + FALLBACKS):
        publish(store, other, seed=seed)
    follower.follow()
    assert follower.state == FollowerState(release=2)
    publish(store, base, seed=2)
    follower.follow()
    assert numbers(swapped) == [2, 5 + FALLBACKS]


def test_another_models_release_that_could_not_be_read_once_is_passed_over(
    follower: ReleaseFollower,
    store: ObjectStore,
    base: BaseModel,
    other: BaseModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish(store, base)
    publish(store, other)

    def silent(store: ObjectStore, number: int) -> Release:
        raise StoreError("The store is silent.")

    with monkeypatch.context() as patched:
        patched.setattr(release_follower, "read_release", silent)
        follower.follow()
    assert "silent" in (follower.state.error or "")
    monkeypatch.setattr(follower, "_next_attempt", 0.0)
    follower.follow()
    assert follower.state == FollowerState(release=1)


def test_a_damaged_head_below_another_models_releases_is_fallen_back_from(
    follower: ReleaseFollower, store: ObjectStore, base: BaseModel, other: BaseModel, swapped: list[LoadedRelease]
) -> None:
    publish(store, base)
    damage(store, publish(store, base, seed=2).memories[0].path)
    publish(store, other)
    follower.follow()
    assert numbers(swapped) == [1]
    assert "Release 2 is not used" in (follower.state.error or "")


def test_a_store_that_cannot_be_read_is_an_error_and_no_exception(base: BaseModel) -> None:
    store = ObjectStore("s3://nobody/nothing", s3_endpoint_url="http://127.0.0.1:9")
    follower = ReleaseFollower(store, base, lambda _: None, poll_seconds=3600)
    follower.follow()
    assert "The store cannot be read" in (follower.state.error or "")


def test_the_thread_follows_by_itself(store: ObjectStore, base: BaseModel, swapped: list[LoadedRelease]) -> None:
    taken = threading.Event()
    follower = ReleaseFollower(
        store, base, lambda release: (swapped.append(release), taken.set())[0], poll_seconds=0.01
    )
    follower.start()
    assert follower.alive
    publish(store, base)
    assert taken.wait(30)
    follower.close()
    assert not follower.alive
    assert numbers(swapped) == [1]
