"""Releases: create-only manifests `releases/00000001.json`, of which the largest number is the head.

There is no mutable pointer. What a manifest names is stored before it, so a crash between any two writes leaves the
last head readable. A manifest carries no time: it is a function of log, config and model.
"""

import json
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError, field_validator

from pipeline.errors import AlreadyExists, CorruptObject, NotFound, RoundConflict
from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import ObjectStore, checked_path
from pipeline.storage.schemas import RELEASE_VERSION, check_version

FOLDER = "releases"
NO_ROUND = "live"  # round_id of live releases before the first round
NAME = re.compile(r"releases/(\d{8})\.json")


class ObjectRef(BaseModel):
    """One immutable object and the checksum it must have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str

    @field_validator("path")
    @classmethod
    def inside_the_store(cls, path: str) -> str:
        return checked_path(path)


class LivePart(BaseModel):
    """What edits that were posted to an endpoint added to the release of a round, until the next round folds it. A live
    release keeps the `round_id` of the release that it adds to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memories: int  # how many of the release's memories are fresh: the last ones
    fitted_on: int  # entries that the bank had when the router was last fitted
    failed: tuple[str, ...] = ()  # ids of living edits that did not come to hold; they are not in the bank


class Release(BaseModel):
    """What an endpoint serves: the side memories of one model, and the router and bank that choose among them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = RELEASE_VERSION
    number: int
    parent: int | None
    round_id: str
    log_version: int
    model_fingerprint: str
    layer: int
    memories: tuple[ObjectRef, ...]
    router: ObjectRef
    bank: ObjectRef
    readouts: ObjectRef | None = None  # what the memories say at every edit's own keys, for matched addressing
    thresholds: tuple[FiniteFloat, ...] | None = None  # ε of each memory, for activation routing; None: by the router
    whole_prompt: bool = False  # memories act on the whole routed prompt, not from its last token on
    edits: int
    scores: dict[str, FiniteFloat] = {}
    restores: int | None = None
    live: LivePart | None = None

    @property
    def objects(self) -> tuple[ObjectRef, ...]:
        """Everything the release needs to be served."""
        readouts = () if self.readouts is None else (self.readouts,)
        return (*self.memories, self.router, self.bank, *readouts)


def head(store: ObjectStore) -> Release | None:
    """The newest release, or None before the first one."""
    numbers = release_numbers(store)
    return read_release(store, numbers[-1]) if numbers else None


def newest_of_a_round(store: ObjectStore) -> Release | None:
    """The newest release that is no rollback: what the last round made of the log, whether or not it still stands."""
    for number in reversed(release_numbers(store)):
        release = read_release(store, number)
        if release.restores is None:
            return release
    return None


def only_live_since(store: ObjectStore, number: int | None) -> bool:
    """Whether all that was published after release `number` are live edits: no round, no rollback."""
    round_id = NO_ROUND if number is None else read_release(store, number).round_id
    newer = [read_release(store, one) for one in release_numbers(store) if one > (number or 0)]
    return all(release.live and release.restores is None and release.round_id == round_id for release in newer)


def list_releases(store: ObjectStore) -> list[Release]:
    """Every release, oldest first."""
    return [read_release(store, number) for number in release_numbers(store)]


def release_numbers(store: ObjectStore) -> list[int]:
    """Rising numbers of the releases there are; one listing, no object is read."""
    names = (NAME.fullmatch(path) for path in store.list(FOLDER))
    return sorted(int(name[1]) for name in names if name)


def read_release(store: ObjectStore, number: int) -> Release:
    """Raises NotFound, CorruptObject, or NewerSchema when a newer wiseline wrote it."""
    try:
        data = store.read(release_path(number))
    except NotFound:
        there = release_numbers(store)
        known = f"there are {there[0]} to {there[-1]}" if there else "nothing is published yet"
        raise NotFound(f"There is no release {number} in {store.uri}; {known}.") from None
    what = f"Release {number}"
    try:
        fields = json.loads(data)
        check_version(fields.get("schema_version"), RELEASE_VERSION, what)
        release = Release.model_validate(fields)
    except (ValueError, AttributeError, ValidationError) as error:
        raise CorruptObject(f"{what} in {store.uri} cannot be decoded; restore {release_path(number)}.") from error
    if release.number != number:
        raise CorruptObject(f"{what} in {store.uri} calls itself {release.number}; restore {release_path(number)}.")
    return release


def publish(store: ObjectStore, release: Release) -> None:
    """Make `release` the head; of all publishers with one parent exactly one succeeds.

    Raises RoundConflict where another release came first, and NotFound where an object it names is missing: then
    nothing is published. After OutcomeUnknown the head says whether it was.
    """
    numbers = release_numbers(store)
    parent = numbers[-1] if numbers else None
    if release.parent != parent or release.number != (parent or 0) + 1:
        raise _conflict(release, parent)
    for reference in release.objects:
        if not store.exists(reference.path):
            raise NotFound(
                f"Release {release.number} names {reference.path}, which is not in {store.uri}; run the round again."
            )
    try:
        store.create(release_path(release.number), encode_release(release))
    except AlreadyExists:
        raise _conflict(release, release.number) from None


def rollback(store: ObjectStore, number: int) -> Release:
    """Publish a new release with the memories, router and bank of release `number`, and return it. Its `log_version` is
    the log's now: what was said up to here is known to whoever rolls back, and is not published over it.

    Raises NotFound where the release or one of its objects is gone, and RoundConflict like `publish`.
    """
    older = read_release(store, number)
    newest = release_numbers(store)[-1]  # by its name alone: a head that cannot be read is what one rolls back from
    seen = EditLog(store).version()
    log_version = older.log_version if seen is None else seen
    restored = older.model_copy(
        update={"number": newest + 1, "parent": newest, "restores": number, "log_version": log_version}
    )
    publish(store, restored)
    return restored


def describe(store: ObjectStore, release: Release) -> dict[str, Any]:
    """The manifest as JSON has it, and when it was `published` by the store's clock."""
    published = store.modified(release_path(release.number))
    return {**release.model_dump(mode="json"), "published": published.isoformat()}


def release_path(number: int) -> str:
    return f"{FOLDER}/{number:08d}.json"


def encode_release(release: Release) -> bytes:
    return (json.dumps(release.model_dump(mode="json"), sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def _conflict(release: Release, winner: int | None) -> RoundConflict:
    return RoundConflict(
        f"Release {winner} was published while release {release.number} was being made, so this one is not published; "
        "run the round again to build on it."
    )
