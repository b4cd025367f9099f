"""What the steps of one round leave each other in the store, where each is a command of its own."""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import AlreadyExists, ConfigError, CorruptObject, NotFound
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import Release

ROUND_ID = re.compile(r"[0-9a-f]+")
BEGAN = re.compile(r"rounds/([^/]+)/began-after-(\d{8})-at-(\d{20})\.json")


@dataclass(frozen=True)
class Beginning:
    """What the round answers for: the log as of `log_version`, on top of release `parent` (None: the first)."""

    log_version: int
    parent: int | None


def note_beginning(store: ObjectStore, round_id: str, beginning: Beginning) -> None:
    """Planned again, the round begins anew there: on top of a newer release, or from a version of the log whose files
    `compact` has not removed. The round is the same from any version, or its id would be another."""
    path = f"rounds/{round_id}/began-after-{beginning.parent or 0:08d}-at-{beginning.log_version:020d}.json"
    store.put(path, b"{}\n")  # its name says it all


def read_beginning(store: ObjectStore, round_id: str) -> Beginning:
    """The newest one. Raises NotFound where the round was never planned, and ConfigError for what is no round's id."""
    if not ROUND_ID.fullmatch(round_id):
        raise ConfigError(f"{round_id!r} is no round's id; give the one that `wiseline round --step plan` printed.")
    noted = [match for path in store.list(f"rounds/{round_id}") if (match := BEGAN.fullmatch(path))]
    if not noted:
        raise NotFound(f"Round {round_id} is not planned in {store.uri}; run `wiseline round --step plan` first.")
    _, parent, version = max(match.groups() for match in noted)
    return Beginning(log_version=int(version), parent=int(parent) or None)


def keep_candidate(store: ObjectStore, release: Release, report: Mapping[str, Any]) -> None:
    """What passed the gate, and the report on it. Of two who evaluate at once one's stays."""
    if find_candidate(store, release.round_id) is None:
        store.remove(_candidate_path(release.round_id))
    kept = {"release": release.model_dump(mode="json"), "report": report}
    with contextlib.suppress(AlreadyExists):
        store.create(_candidate_path(release.round_id), json.dumps(kept, ensure_ascii=False, indent=1).encode())


def find_candidate(store: ObjectStore, round_id: str) -> tuple[Release, dict[str, Any]] | None:
    """None also where an object that it names is gone: it cannot be published, and is to be made again."""
    path = _candidate_path(round_id)
    if not store.exists(path):
        return None
    kept = _read(store, path)
    release = Release.model_validate(kept["release"])
    there = all(store.exists(reference.path) for reference in release.objects)
    return (release, dict(kept["report"])) if there else None


def _read(store: ObjectStore, path: str) -> Any:
    try:
        return json.loads(store.read(path))
    except ValueError as error:
        raise CorruptObject(f"{path} in {store.uri} is damaged; remove it and run the step again.") from error


def _candidate_path(round_id: str) -> str:
    return f"rounds/{round_id}/candidate.json"
