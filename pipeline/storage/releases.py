"""Releases: create-only manifests `releases/00000001.json`, of which the largest number is the head.

There is no mutable pointer. What a manifest names is stored before it, so a crash between any two writes leaves the
last head readable. A manifest carries no time: it is a function of log, config and model.

A store may hold releases of several base models side by side: while one is served, a round makes the next one's from
the same log. They share one row of numbers; each model has its own head, and only its own publishers are in its way.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
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
    parent: int | None  # nothing of its model came between that release and this one
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


@dataclass(frozen=True)
class OfModel:
    """Whose releases are meant. Keep it: manifests never change, so another model's is read once."""

    fingerprint: str
    layer: int
    others: set[int] = field(default_factory=set, compare=False, repr=False)
    rounds: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)  # path -> is it its

    def has(self, release: Release) -> bool:
        return (release.model_fingerprint, release.layer) == (self.fingerprint, self.layer)


def newest_first(store: ObjectStore, model: OfModel | None = None, *, after: int = 0) -> Iterator[Release]:
    """The releases after release `after`: those of `model`, or of all models."""
    for number in reversed(release_numbers(store)):
        if number <= after:
            return
        if model is None or number not in model.others:
            release = read_release(store, number)
            if model is None or model.has(release):
                yield release
            else:
                model.others.add(number)


def head(store: ObjectStore, model: OfModel | None = None) -> Release | None:
    """The newest release, or None before the first one."""
    return next(newest_first(store, model), None)


def newest_of_a_round(store: ObjectStore, model: OfModel | None = None) -> Release | None:
    """The newest release that is no rollback: what the last round made of the log, whether or not it still stands."""
    return next((release for release in newest_first(store, model) if release.restores is None), None)


def only_live_since(store: ObjectStore, number: int | None, model: OfModel | None = None) -> bool:
    """Whether all that was published after release `number` are live edits: no round, no rollback."""
    round_id = NO_ROUND if number is None else read_release(store, number).round_id
    newer = newest_first(store, model, after=number or 0)
    return all(release.live and release.restores is None and release.round_id == round_id for release in newer)


def list_releases(store: ObjectStore) -> list[Release]:
    """Every release, oldest first."""
    return [read_release(store, number) for number in release_numbers(store)]


def release_numbers(store: ObjectStore) -> list[int]:
    """Rising numbers of the releases there are; one listing, no object is read."""
    names = (NAME.fullmatch(path) for path in store.list(FOLDER))
    return sorted(int(name[1]) for name in names if name)


def next_number(store: ObjectStore) -> int:
    numbers = release_numbers(store)
    return numbers[-1] + 1 if numbers else 1


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


def publish(store: ObjectStore, release: Release) -> Release:
    """Make `release` its model's head, under the next number; of all publishers for one model with one parent exactly
    one succeeds. Returns it as it was published.

    Raises RoundConflict where another release of the model came first, and NotFound where an object it names is
    missing: then nothing is published. After OutcomeUnknown `published_as` says whether it was.
    """
    model, parent = OfModel(release.model_fingerprint, release.layer), release.parent or 0
    while True:
        last = next_number(store) - 1  # read before the releases are: what comes between has this number, and wins
        newer = next(newest_first(store, model, after=parent), None)
        if newer is not None or parent > last:
            raise _conflict(newer.number if newer else last)
        release = release.model_copy(update={"number": last + 1})
        for reference in release.objects:
            if not store.exists(reference.path):
                raise NotFound(
                    f"Release {last + 1} names {reference.path}, which is not in {store.uri}; run the round again."
                )
        try:
            store.create(release_path(release.number), encode_release(release))
        except AlreadyExists:
            continue  # another model's, or the one that won
        return release


def published_as(store: ObjectStore, release: Release) -> Release | None:
    """`release` as it stands among those after its parent, or None where it was not published."""
    model = OfModel(release.model_fingerprint, release.layer)
    for one in newest_first(store, model, after=release.parent or 0):
        if one.model_copy(update={"number": release.number}) == release:
            return one
    return None


def rollback(store: ObjectStore, number: int) -> Release:
    """Publish a new release with the memories, router and bank of release `number`, and return it. Its `log_version` is
    the log's now: what was said up to here is known to whoever rolls back, and is not published over it.

    Raises NotFound where the release or one of its objects is gone, and RoundConflict like `publish`.
    """
    older = read_release(store, number)
    newest = next_number(store) - 1  # by its name alone: a head that cannot be read is what one rolls back from
    seen = EditLog(store).version()
    log_version = older.log_version if seen is None else seen
    return publish(store, older.model_copy(update={"parent": newest, "restores": number, "log_version": log_version}))


def describe(store: ObjectStore, release: Release) -> dict[str, Any]:
    """The manifest as JSON has it, and when it was `published` by the store's clock."""
    published = store.modified(release_path(release.number))
    return {**release.model_dump(mode="json"), "published": published.isoformat()}


def release_path(number: int) -> str:
    return f"{FOLDER}/{number:08d}.json"


def encode_release(release: Release) -> bytes:
    return (json.dumps(release.model_dump(mode="json"), sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def _conflict(winner: int) -> RoundConflict:
    return RoundConflict(
        f"Release {winner} was published while this one was being made, so this one is not published; "
        "run the round again to build on it."
    )
