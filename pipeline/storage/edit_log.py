"""The edit log: Delta tables `edits/` (append-only upserts and retractions) and `quarantine/` (rows refused, and why).

The newest entry of a slot wins; history stays. Commits are serial, so `seq` numbers the entries 0, 1, 2, … without gaps
whatever runs at the same time, and the same files read in the same order give the same log.
"""

import hashlib
import random
import time
from collections import ChainMap
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from pydantic import ValidationError

from pipeline.edits import TUPLES, Edit
from pipeline.errors import CorruptObject, StoreError
from pipeline.storage.batches import Batch, Counts, Rejection, SlotContent, plan_append
from pipeline.storage.delta_table import CommitLost, commit, make_table, open_table, read_table, was_committed
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.schemas import EDITS, QUARANTINE

TABLE = "edits"
QUARANTINE_TABLE = "quarantine"
RETRACT_SOURCE = "wiseline retract"
POSTED = "POST /v1/edits"  # source of the edits that an endpoint was given
# 16 ingests at once need at most 16 turns each; far above that something else is wrong.
MOST_ATTEMPTS = 100


@dataclass(frozen=True)
class LogEntry:
    seq: int
    edit: Edit
    source: str
    row: int
    batch_id: str
    ingested_at: datetime


@dataclass
class _State:
    """What the newest version of the log holds, kept between appends so that each one reads only what is new."""

    version: int
    slots: dict[str, SlotContent]
    next_seq: int


class EditLog:
    """The log of one store. Reading methods take the newest version unless one is named; raise StoreError."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._state: _State | None = None

    def version(self) -> int | None:
        """The newest version, which a round may name as its snapshot; None before the first ingest."""
        table = open_table(self._store, TABLE)
        return None if table is None else table.version()

    def history(self, version: int | None = None, *, since: int = 0) -> list[LogEntry]:
        """Every entry ever made, in log order; or those from the `seq` on that `since` names."""
        table = open_table(self._store, TABLE, version=version)
        where = pc.field("seq") >= since if since else None
        return [] if table is None else _entries(read_table(self._store, table, where=where).sort_by("seq"))

    def length(self, version: int | None = None) -> int:
        """How many entries there are."""
        table = open_table(self._store, TABLE, version=version)
        return 0 if table is None else read_table(self._store, table, ["seq"]).num_rows

    def live(self, version: int | None = None) -> list[LogEntry]:
        """The newest entry of each slot that is not retracted, in log order."""
        table = open_table(self._store, TABLE, version=version)
        if table is None:
            return []
        rows = read_table(self._store, table).sort_by("seq")
        newest = {slot: index for index, slot in enumerate(rows["slot_id"].to_pylist())}
        rows = rows.take(pa.array(sorted(newest.values()), pa.int64()))
        return _entries(rows.filter(pc.equal(rows["op"], "upsert")))

    def slots(self, version: int | None = None) -> dict[str, tuple[str, str]]:
        """Slot id -> (edit id, op) of its newest entry, from the narrow columns only."""
        table = open_table(self._store, TABLE, version=version)
        if table is None:
            return {}
        rows = read_table(self._store, table, ["seq", "slot_id", "edit_id", "op"]).sort_by("seq")
        return {row["slot_id"]: (row["edit_id"], row["op"]) for row in rows.to_pylist()}

    def quarantine(self) -> list[tuple[str, Rejection]]:
        """(source, rejection) of every row ever refused, by source and row."""
        table = open_table(self._store, QUARANTINE_TABLE)
        if table is None:
            return []
        rows = read_table(self._store, table, ["source", "row", "reason", "raw"]).to_pylist()
        rows.sort(key=lambda row: (row["source"], row["row"]))
        return [(row["source"], Rejection(row["row"], row["reason"], row["raw"])) for row in rows]

    def append(
        self, batch: Batch, *, said: MutableMapping[str, SlotContent] | None = None, again: bool = False
    ) -> Counts:
        """Append what is new in `batch`: refused rows to quarantine/, then edits in one commit; say what each row was.

        `said` carries what earlier batches of the same call said about each slot and is brought up to date; a row that
        repeats it is a duplicate. Appending a batch again changes nothing, so after OutcomeUnknown, or a crash
        anywhere, the same call is safe to repeat. With `again` its rows speak although the log has heard them: what
        differs from the slots is appended, which is how an older answer is restored.
        """
        said = {} if said is None else said
        self._set_aside(batch)
        read_before: dict[int, str] = {}
        for table, state in self._attempts():
            known = not again and was_committed(table, batch.batch_id)
            if not known and not again:
                read_before = self._read_before(table, batch)
            plan = plan_append(batch, state.slots, said=said, known=known, read_before=read_before)
            if not known:
                rows = _log_rows(plan.rows, source=batch.source, batch_id=batch.batch_id, first_seq=state.next_seq)
                try:
                    commit(self._store, table, rows, transaction=batch.batch_id)
                except CommitLost:
                    continue
                self._advance(state, table, plan.slots, len(plan.rows))
            said.update(plan.said)
            return plan.counts
        raise self._crowded()

    def append_together(self, batches: Sequence[Batch]) -> list[Counts]:
        """Append what differs from the slots, one batch after another, in one commit: many small posts cost one.

        Every batch speaks, as with `again`, so each must have an id of its own; none may have rejections."""
        batch_ids = [batch.batch_id for batch in batches]
        for table, state in self._attempts():
            held: dict[str, SlotContent] = {}
            counts, tables, next_seq = [], [], state.next_seq
            for batch in batches:
                plan = plan_append(batch, ChainMap(held, state.slots), said={}, known=False, read_before={})
                held.update(plan.slots)
                counts.append(plan.counts)
                tables.append(_log_rows(plan.rows, source=batch.source, batch_id=batch.batch_id, first_seq=next_seq))
                next_seq += len(plan.rows)
            try:
                commit(self._store, table, pa.concat_tables(tables), transaction=_digest(*batch_ids))
            except CommitLost:
                continue
            self._advance(state, table, held, next_seq - state.next_seq)
            return counts
        raise self._crowded()

    def retract(
        self, slot_ids: Iterable[str], *, author: str | None = None, edit_id: str | None = None
    ) -> list[LogEntry]:
        """Empty slots and return the entries that were live in them; slots already empty are left alone, and those
        that another edit than `edit_id` fills, where it is given.

        One commit. Unlike a row of a file, a retraction made here speaks every time it is called.
        """
        wanted = set(slot_ids)
        for table, state in self._attempts():
            entries = [
                entry
                for entry in self.live(state.version)
                if entry.edit.slot_id in wanted and edit_id in (None, entry.edit.edit_id)
            ]
            if not entries:
                return []
            retractions = [
                (entry.seq, Edit(op="retract", prompt=entry.edit.prompt, subject=entry.edit.subject, author=author))
                for entry in entries
            ]
            batch_id = _digest(RETRACT_SOURCE, state.next_seq, *(entry.edit.slot_id for entry in entries))
            rows = _log_rows(retractions, source=RETRACT_SOURCE, batch_id=batch_id, first_seq=state.next_seq)
            try:
                commit(self._store, table, rows, transaction=batch_id)
            except CommitLost:
                continue
            self._advance(state, table, {entry.edit.slot_id: None for entry in entries}, len(entries))
            return entries
        raise self._crowded()

    def _attempts(self) -> Iterator[tuple[DeltaTable, _State]]:
        for attempt in range(MOST_ATTEMPTS):
            if attempt:
                time.sleep(random.uniform(0, 0.02 * min(attempt, 10)))
            yield self._current()

    def _current(self) -> tuple[DeltaTable, _State]:
        """The table and its newest state; where the table moved since we last looked, only what is new is read."""
        table = make_table(self._store, TABLE, EDITS)
        state = self._state
        if state is None or state.version != table.version():
            before = state or _State(-1, {}, 0)
            newer = pc.field("seq") >= before.next_seq
            rows = read_table(self._store, table, ["seq", "slot_id", "edit_id", "op"], where=newer).sort_by("seq")
            slots = {row["slot_id"]: row["edit_id"] if row["op"] == "upsert" else None for row in rows.to_pylist()}
            state = _State(table.version(), before.slots | slots, before.next_seq + rows.num_rows)
        self._state = state
        return table, state

    def _advance(self, state: _State, table: DeltaTable, slots: dict[str, SlotContent], count: int) -> None:
        state.version = table.version()  # only now: a commit that failed may have moved the table object all the same
        state.slots.update(slots)
        state.next_seq += count

    def _read_before(self, table: DeltaTable, batch: Batch) -> dict[int, str]:
        """Row -> edit id that the log last heard from this source: a file that grew is read from its start, but only
        its end is new; a file that is overwritten speaks where a row changed."""
        rows = read_table(self._store, table, ["seq", "row", "edit_id"], where=pc.field("source") == batch.source)
        return {row["row"]: row["edit_id"] for row in rows.sort_by("seq").to_pylist()}

    def _set_aside(self, batch: Batch) -> None:
        """Write the batch's refused rows, each once, whether it comes again in the same batch or in a grown file."""
        if not batch.rejections:
            return
        moment = datetime.now(UTC)
        for _ in range(MOST_ATTEMPTS):
            table = make_table(self._store, QUARANTINE_TABLE, QUARANTINE)
            if was_committed(table, batch.batch_id):
                return
            there = set(read_table(self._store, table, ["row_id"])["row_id"].to_pylist())
            rows = [
                {
                    "row_id": _digest(batch.source, bad.row, bad.raw),
                    "source": batch.source,
                    "row": bad.row,
                    "reason": bad.reason,
                    "raw": bad.raw,
                    "batch_id": batch.batch_id,
                    "ingested_at": moment,
                }
                for bad in batch.rejections
            ]
            new = [row for row in rows if row["row_id"] not in there]
            try:
                commit(self._store, table, pa.Table.from_pylist(new, schema=QUARANTINE), transaction=batch.batch_id)
            except CommitLost:
                continue
            return
        raise self._crowded()

    def _crowded(self) -> StoreError:
        return StoreError(f"{self._store.uri}: others kept writing first; nothing of this batch landed, run it again.")


def _log_rows(edits: Sequence[tuple[int, Edit]], *, source: str, batch_id: str, first_seq: int) -> pa.Table:
    moment = datetime.now(UTC)
    rows = [
        edit.model_dump(mode="json")
        | {"edit_id": edit.edit_id, "slot_id": edit.slot_id, "source": source, "row": row, "batch_id": batch_id}
        | {"seq": first_seq + index, "ingested_at": moment}
        for index, (row, edit) in enumerate(edits)
    ]
    return pa.Table.from_pylist(rows, schema=EDITS)


def _entries(rows: pa.Table) -> list[LogEntry]:
    return [_entry(row) for row in rows.to_pylist()]


def _entry(row: dict[str, object]) -> LogEntry:
    try:
        edit = Edit.model_validate(row | {name: tuple(row[name] or ()) for name in TUPLES})  # type: ignore[arg-type]
    except ValidationError as error:
        raise CorruptObject(f"Entry {row['seq']} of the edit log does not read as an edit ({error}).") from error
    kept = {name: row[name] for name in ("seq", "source", "row", "batch_id", "ingested_at")}
    return LogEntry(edit=edit, **kept)  # type: ignore[arg-type]


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()
