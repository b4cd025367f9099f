"""Plan a round: which edits make which shard of which side memory. A pure function of the log and the config.

The log is replayed in order. Edits fill the newest memory; when it is full it is sealed and never trained again. An
edit that is superseded or retracted leaves a sealed memory by losing its bank entry: the router can then no longer
reach it. A sealed memory that is mostly dead is dissolved, and its living edits move to the newest one. So what a round
must train follows what changed, and the same log gives the same plan on any machine.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from pipeline.config import Config
from pipeline.edits import Edit
from pipeline.storage.edit_log import LogEntry

METHOD_VERSION = 6  # raise it when the same plan trains to other bytes or files: older shards are then not found
RELEASE_VERSION = 5  # raise it when the same shards give another router or readout: the next round then publishes
DISSOLVE_BELOW = 0.5  # share of living edits; at one half, a dissolved memory's edits were trained twice at most


@dataclass(frozen=True)
class ShardPlan:
    """One shard: what it is trained on decides its digest, and the digest its place in the store."""

    digest: str
    index: int  # within its memory; chooses the mask
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class MemoryPlan:
    """k shards that are merged into one matrix. With a sibling penalty each is trained with the others' keys in sight,
    so the memory, not the shard, is what its digest stands for."""

    digest: str
    seed: int
    shards: tuple[ShardPlan, ...]
    live: frozenset[str]  # edit ids the bank may name

    @property
    def edits(self) -> list[Edit]:
        return [edit for shard in self.shards for edit in shard.edits]


@dataclass(frozen=True)
class Plan:
    round_id: str
    fingerprint: str  # of the base model
    layer: int
    log_version: int
    encoder: str  # fingerprint of the sentence encoder the router is to read with; empty without one
    memories: tuple[MemoryPlan, ...]
    too_long: tuple[str, ...]  # prompts of edits that would live, but that the model's context cannot hold

    @property
    def live_edits(self) -> list[Edit]:
        return [edit for memory in self.memories for edit in memory.edits if edit.edit_id in memory.live]


def plan_round(
    history: Iterable[LogEntry],
    *,
    log_version: int,
    config: Config,
    fingerprint: str,
    layer: int,
    encoder: str,
    fits: Callable[[Edit], bool],
) -> Plan:
    """Plan for the log as of `log_version`. Every living edit that `fits` the model's context is in one memory.
    `encoder`: fingerprint of the sentence encoder that the router will read with; empty without one.

    The round's id stands for what it will publish: a log that moved on without saying anything new gives the same id.
    """
    capacity = config.shards.edits_per_shard * config.shards.shards_per_memory
    basis = _basis(config, fingerprint=fingerprint, layer=layer)
    groups, too_long = _replay(history, capacity=capacity, fits=fits)
    # The paper's procedure picks texts that do not mention the subjects.
    named = config.training.procedure == "paper"
    memories = tuple(
        _memory_plan(group, basis=basis, shard_count=config.shards.shards_per_memory, by_subject=named)
        for group in groups
    )
    # The fingerprint stands for the model: where it lies on this machine changes nothing.
    settings = config.digest("merge", "router", "round")
    return Plan(
        round_id=_digest(
            [*basis, RELEASE_VERSION, encoder, settings, [[memory.digest, sorted(memory.live)] for memory in memories]]
        ),
        fingerprint=fingerprint,
        layer=layer,
        log_version=log_version,
        encoder=encoder,
        memories=memories,
        too_long=too_long,
    )


def plan_shard(edits: Sequence[Edit], *, config: Config, fingerprint: str, layer: int) -> ShardPlan:
    """A shard of its own for a few edits, beside what a round plans."""
    basis = _basis(config, fingerprint=fingerprint, layer=layer)
    return ShardPlan(digest=_digest([*basis, "fresh", [edit.edit_id for edit in edits]]), index=0, edits=tuple(edits))


def _basis(config: Config, *, fingerprint: str, layer: int) -> list[object]:
    return [
        METHOD_VERSION,
        fingerprint,
        layer,
        config.model.dtype,
        config.digest("shards", "training"),
        config.router.addressing,  # a memory trains where it will be read
    ]


@dataclass(eq=False)
class _Group:
    """The edits of one memory by slot; those in `live` are still what their slot says."""

    edits: dict[str, Edit] = field(default_factory=dict)
    live: set[str] = field(default_factory=set)


def _replay(
    history: Iterable[LogEntry], *, capacity: int, fits: Callable[[Edit], bool]
) -> tuple[list[_Group], tuple[str, ...]]:
    sealed: dict[_Group, None] = {}  # in order; asked for and left at any place, a million edits fill thousands
    newest = _Group()
    home: dict[str, _Group] = {}  # slot -> the memory that answers for it
    too_long: dict[str, str] = {}  # slot -> prompt

    def place(slot_id: str, edit: Edit) -> None:
        nonlocal newest
        newest.edits[slot_id] = edit
        newest.live.add(slot_id)
        home[slot_id] = newest
        if len(newest.edits) == capacity:
            sealed[newest] = None
            newest = _Group()

    for entry in history:
        slot_id = entry.edit.slot_id
        previous = home.pop(slot_id, None)
        too_long.pop(slot_id, None)
        if previous is newest:
            del newest.edits[slot_id]
            newest.live.discard(slot_id)
        elif previous is not None:
            previous.live.discard(slot_id)
        if entry.edit.op == "upsert" and fits(entry.edit):
            place(slot_id, entry.edit)
        elif entry.edit.op == "upsert":
            too_long[slot_id] = entry.edit.prompt
        if previous in sealed and len(previous.live) < DISSOLVE_BELOW * len(previous.edits):
            del sealed[previous]
            for moved in [slot for slot in previous.edits if slot in previous.live]:
                place(moved, previous.edits[moved])
    groups = [*sealed, newest] if newest.edits else [*sealed]
    return groups, tuple(too_long.values())


def _memory_plan(group: _Group, *, basis: Sequence[object], shard_count: int, by_subject: bool) -> MemoryPlan:
    def trained_on(edit: Edit) -> tuple[str | None, ...]:
        return (edit.prompt, edit.target, *([edit.subject] if by_subject else []))

    edits = list(group.edits.values())
    dealt = [tuple(edits[index::shard_count]) for index in range(min(shard_count, len(edits)))]
    digest = _digest([*basis, [[trained_on(edit) for edit in shard] for shard in dealt]])
    return MemoryPlan(
        digest=digest,
        seed=int(digest[:8], 16),
        shards=tuple(
            ShardPlan(digest=_digest([digest, index]), index=index, edits=shard) for index, shard in enumerate(dealt)
        ),
        live=frozenset(group.edits[slot].edit_id for slot in group.live),
    )


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:24]
