"""What the log says and a release does not follow yet: what waits for the next round, or for live training."""

import json
import re
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.edits import Edit
from pipeline.errors import StoreError
from pipeline.storage.bank import BankEntry
from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import NO_ROUND, Release


def waiting(newest: pa.Table, bank: Sequence[BankEntry], *, decided: int) -> pa.Table:
    """Rows of `newest` (`EditLog.newest`): edits that the bank lacks, and retractions of edits that it holds.

    Of the first `decided` entries of the log somebody has chosen what is in the bank, so what is not does not wait."""
    said = pc.equal(newest["op"], "upsert")
    held = pa.array([entry.edit_id for entry in bank], pa.string())
    coming = pc.and_(
        pc.and_(said, pc.invert(pc.is_in(newest["edit_id"], value_set=held))),
        pc.greater_equal(newest["seq"], decided),
    )
    lives = pc.is_in(held, value_set=newest.filter(said)["edit_id"].combine_chunks())
    gone = [entry for entry, there in zip(bank, lives.to_pylist(), strict=True) if not there]
    slots = pa.array([_slot(entry) for entry in gone], pa.string())
    leaving = pc.and_(pc.invert(said), pc.is_in(newest["slot_id"], value_set=slots))
    return newest.filter(pc.or_(coming, leaving))


def decided(store: ObjectStore, standing: Release | None) -> int:
    """How many entries of the log were heard by the round whose memories stand, or by whoever rolled back. What they
    left out (too long for the model, or newer than what was restored) is not taken up again by itself."""
    if standing is None:
        return 0
    if standing.live is not None and standing.restores is None:
        return _heard_by_round(store, standing.round_id)
    return _length(store, standing.log_version)


def _length(store: ObjectStore, version: int) -> int:
    try:
        return EditLog(store).length(version)
    except StoreError:  # Delta forgets old versions after a month; what was left out then counts as waiting
        return 0


def _heard_by_round(store: ObjectStore, round_id: str) -> int:
    """By its newest report; 0 where there is none."""
    reports = re.compile(r"rounds/[^/]+/\d{8}T\d{12}/report\.json")
    found = (
        [] if round_id == NO_ROUND else [path for path in store.list(f"rounds/{round_id}") if reports.fullmatch(path)]
    )
    if not found:
        return 0
    return _length(store, int(json.loads(store.read(max(found)))["log_version"]))


def _slot(entry: BankEntry) -> str:
    return Edit(prompt=entry.prompt, target=entry.target, subject=entry.subject).slot_id
