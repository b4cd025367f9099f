"""What a round leaves in the store while it runs, and how far it is by that.

A round writes its plan first, then per shard keys, states and delta, and a report at its end. Nothing says "I am
alive": a round that was killed looks like one that has been silent for long, and `news` says for how long.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from pipeline.errors import CorruptObject
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import OfModel, head
from pipeline.training.planning import Plan
from pipeline.training.shard_files import FILES, shard_path

REPORT = re.compile(r"rounds/([^/]+)/(\d{8}T\d{12})/report\.json")
PLAN = re.compile(r"rounds/([^/]+)/plan\.json")
LAST = 8  # shards are trained in the plan's order, so the newest file is among the last ones

ShardState = Literal["waiting", "extracted", "trained"]


@dataclass(frozen=True)
class ShardSeen:
    memory: int
    shard: int
    edits: int
    state: ShardState


@dataclass(frozen=True)
class Unfinished:
    """A round without an outcome. `news`: when it last wrote something."""

    round_id: str
    began: datetime
    news: datetime
    shards: tuple[ShardSeen, ...]


@dataclass(frozen=True)
class Finished:
    round_id: str
    ended: datetime
    missed: bool  # a threshold, so that nothing was published
    report: str  # path of its report.json


def write_plan(store: ObjectStore, plan: Plan) -> None:
    """Without the log version: a log that moved on without saying anything new has the same plan."""
    content = {
        "round_id": plan.round_id,
        "model": {"fingerprint": plan.fingerprint, "layer": plan.layer},
        "memories": [
            {
                "digest": memory.digest,
                "shards": [
                    {"digest": shard.digest, "edits": [edit.edit_id for edit in shard.edits]} for shard in memory.shards
                ],
                "live": sorted(memory.live),
            }
            for memory in plan.memories
        ],
    }
    store.put(_plan_path(plan.round_id), json.dumps(content, indent=1).encode())


def look_at_rounds(store: ObjectStore, model: OfModel | None = None) -> tuple[Unfinished | None, Finished | None]:
    """The round that runs, if one does, and the last one that came to an end: of those of `model`, or of all models.
    What an older wiseline wrote does not say whose it is, and counts for every model.

    A plan that is older than the newest report belongs to a round that was given up: what was published since makes it
    stale. Raises StoreError."""
    paths = store.list("rounds")
    last = _last_finished(store, paths, model)
    finished = {match[1] for path in paths if (match := REPORT.fullmatch(path))}
    planned = {match[1] for path in paths if (match := PLAN.fullmatch(path))}
    began = {round_id: store.modified(_plan_path(round_id)) for round_id in planned - finished}
    open_ = [round_id for round_id, moment in began.items() if last is None or moment >= last.ended]
    open_ = [round_id for round_id in open_ if _is_of(store, _plan_path(round_id), model)]
    if not open_:
        return None, last
    newest = max(open_, key=lambda round_id: began[round_id])
    standing = head(store, model)
    # Published, and killed before it wrote its report.
    if standing is not None and standing.round_id == newest:
        return None, last
    return _unfinished(store, newest, began=began[newest]), last


def _last_finished(store: ObjectStore, paths: Sequence[str], model: OfModel | None) -> Finished | None:
    reports = [match for path in paths if (match := REPORT.fullmatch(path))]
    falling = sorted(reports, key=lambda match: match[2], reverse=True)
    newest = next((match for match in falling if _is_of(store, match[0], model)), None)
    if newest is None:
        return None
    # By the store's clock, as the plans' times are.
    return Finished(
        newest[1], store.modified(newest[0]), missed=f"rounds/{newest[1]}/missed.json" in paths, report=newest[0]
    )


def _is_of(store: ObjectStore, path: str, model: OfModel | None) -> bool:
    """Whether this plan or report is `model`'s; it never changes, so it is read once."""
    if model is None:
        return True
    if path not in model.rounds:
        try:
            said: dict[str, Any] | None = json.loads(store.read(path)).get("model")
            mine = said is None or (said["fingerprint"], said["layer"]) == (model.fingerprint, model.layer)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(store, path) from error
        model.rounds[path] = mine
    return model.rounds[path]


def _unfinished(store: ObjectStore, round_id: str, *, began: datetime) -> Unfinished:
    there = set(store.list("shards"))
    path = _plan_path(round_id)
    try:
        memories = json.loads(store.read(path))["memories"]
        digests = [shard["digest"] for memory in memories for shard in memory["shards"]]
        shards = tuple(
            ShardSeen(index, place, len(shard["edits"]), _state(shard["digest"], there))
            for index, memory in enumerate(memories)
            for place, shard in enumerate(memory["shards"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(store, path) from error
    written = [shard_path(digest, name) for name in FILES for digest in _last(digests, name, there)]
    return Unfinished(round_id, began, max([began, *map(store.modified, written)]), shards)


def _damaged(store: ObjectStore, path: str) -> CorruptObject:
    return CorruptObject(f"{path} in {store.uri} is damaged; remove it and run the round again.")


def _state(digest: str, there: set[str]) -> ShardState:
    keys, states, delta = (shard_path(digest, name) in there for name in FILES)
    return "trained" if keys and states and delta else "extracted" if keys and states else "waiting"


def _last(digests: Sequence[str], name: str, there: set[str]) -> list[str]:
    return [digest for digest in digests if shard_path(digest, name) in there][-LAST:]


def _plan_path(round_id: str) -> str:
    return f"rounds/{round_id}/plan.json"
