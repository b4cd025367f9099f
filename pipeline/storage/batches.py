"""What reading a batch of rows changes in the log: a pure function of the batch and of what the log holds.

A batch's id is derived from its content. The same batch, or the same row of the same file, never speaks twice: reading
an old file again neither revives a retracted edit nor undoes a newer one.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property

from pipeline.edits import Edit

# What a slot holds: the edit's id, or None where it is empty (never filled, or retracted).
SlotContent = str | None
NEVER_TOUCHED = ""


@dataclass(frozen=True)
class Rejection:
    """A row that cannot be accepted: where it stands, why, and what it says (cut)."""

    row: int
    reason: str
    raw: str


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one source in their order. `after` is the id of the batch before it in the same source."""

    source: str
    edits: tuple[tuple[int, Edit], ...]
    rejections: tuple[Rejection, ...] = ()
    after: str = ""

    @cached_property
    def batch_id(self) -> str:
        content = [self.after, [edit.edit_id for _, edit in self.edits], [bad.raw for bad in self.rejections]]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Counts:
    """Every row counts once in ingested, unchanged, duplicates or quarantined; the last two say more about ingested."""

    ingested: int = 0
    unchanged: int = 0
    duplicates: int = 0
    quarantined: int = 0
    superseded: int = 0
    retracted: int = 0

    @property
    def rows(self) -> int:
        return self.ingested + self.unchanged + self.duplicates + self.quarantined

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)})


@dataclass(frozen=True)
class Plan:
    """Rows to append, and what the slots hold afterwards: in the log (`slots`) and as this call said (`said`)."""

    rows: tuple[tuple[int, Edit], ...]
    counts: Counts
    slots: dict[str, SlotContent] = field(repr=False)
    said: dict[str, SlotContent] = field(repr=False)


def plan_append(
    batch: Batch,
    slots: Mapping[str, SlotContent],
    *,
    said: Mapping[str, SlotContent],
    known: bool,
    read_before: Mapping[int, str],
) -> Plan:
    """Decide row by row what is new.

    `slots`: what the log holds; `said`: what earlier rows of this call said about a slot; `known`: the log has this
    batch; `read_before`: what the log last heard from each row of the same source.
    """
    held: dict[str, SlotContent] = {}
    spoken: dict[str, SlotContent] = {}
    rows: list[tuple[int, Edit]] = []
    unchanged = duplicates = superseded = retracted = 0
    for row, edit in batch.edits:
        slot, content = edit.slot_id, edit.edit_id if edit.op == "upsert" else None
        before = held[slot] if slot in held else slots.get(slot)
        told = spoken[slot] if slot in spoken else said.get(slot, NEVER_TOUCHED)
        spoken[slot] = content
        if told == content:
            duplicates += 1
        elif known or before == content or read_before.get(row) == edit.edit_id:
            unchanged += 1
        else:
            rows.append((row, edit))
            held[slot] = content
            retracted += content is None
            superseded += content is not None and before is not None
    counts = Counts(len(rows), unchanged, duplicates, len(batch.rejections), superseded, retracted)
    return Plan(tuple(rows), counts, held, spoken)
