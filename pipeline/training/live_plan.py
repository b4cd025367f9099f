"""What a live release does to the one that stands: which entries go on, which posted edits come in. A pure function.

Only edits that were posted to an endpoint are taught live; what came in files waits for the round, which was made for
many. Whoever retracts is heard at once: an entry leaves its bank without any training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.edits import Edit
from pipeline.storage.bank import BankEntry
from pipeline.storage.edit_log import POSTED, LogEntry


@dataclass(frozen=True)
class LivePlan:
    kept: tuple[int, ...]  # places of the bank, ascending
    new: tuple[Edit, ...]  # oldest first
    failed: tuple[str, ...]  # edits known not to hold that still live, and those the model's context cannot hold


def plan_live(
    newest: Mapping[str, LogEntry],
    bank: Sequence[BankEntry],
    *,
    failed: Sequence[str] = (),
    most: int,
    fits: Callable[[Edit], bool],
) -> LivePlan:
    """`newest`: of every slot; `failed`: edits that an earlier live release could not make hold; `most`: new edits at
    a time, the others come next. An entry that a file superseded stays until the round that brings its successor."""
    kept = tuple(place for place, entry in enumerate(bank) if _stays(entry, newest.get(_slot(entry))))
    reached = {bank[place].edit_id for place in kept}
    posted = [
        entry.edit
        for entry in newest.values()
        if entry.source == POSTED and entry.edit.op == "upsert" and entry.edit.edit_id not in reached
    ]
    known = set(failed)
    waiting = [edit for edit in posted if edit.edit_id not in known]
    too_long = {edit.edit_id for edit in waiting if not fits(edit)}
    return LivePlan(
        kept=kept,
        new=tuple([edit for edit in waiting if edit.edit_id not in too_long][:most]),
        failed=tuple(sorted({edit.edit_id for edit in posted} & (known | too_long))),
    )


def _stays(entry: BankEntry, said: LogEntry | None) -> bool:
    if said is None or said.edit.edit_id == entry.edit_id:
        return True
    return said.edit.op == "upsert" and said.source != POSTED


def _slot(entry: BankEntry) -> str:
    return Edit(prompt=entry.prompt, target=entry.target, subject=entry.subject).slot_id
