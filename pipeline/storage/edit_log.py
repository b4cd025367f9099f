"""The edit log: Delta tables `edits/` (append-only upserts and retractions) and `quarantine/` (rows refused, and why).

The newest entry of a slot wins; history stays. Commits are serial: the entries of each stand behind all before it,
whatever runs at the same time, and the same files read in the same order give the same log. The column `seq` orders the
entries and has gaps; the `seq` of a LogEntry numbers them 0, 1, 2, …, and as the log only grows it keeps its number.
"""

import hashlib
import random
import time
from collections import ChainMap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from pydantic import ValidationError

from pipeline.edits import TUPLES, Edit
from pipeline.errors import AlreadyExists, ConfigError, CorruptObject, StoreError
from pipeline.storage.batches import Batch, Counts, Rejection, edit_rows
from pipeline.storage.delta_table import (
    CommitLost,
    commit,
    compact,
    largest,
    make_table,
    open_table,
    read_from,
    read_table,
    refresh,
    row_count,
)
from pipeline.storage.log_append import LogAppend, Refused
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.schemas import EDITS, QUARANTINE

TABLE = "edits"
QUARANTINE_TABLE = "quarantine"
RETRACT_SOURCE = "wiseline retract"
POSTED = "POST /v1/edits"  # source of the edits that an endpoint was given
# 16 ingests at once need at most 16 turns each; far above that something else is wrong.
MOST_ATTEMPTS = 100
# Rounds and ingests that began with an older version of the log have ended by then; Delta's own default.
KEEP_HOURS = 7 * 24
# Twice as long as an ingest may take.
LEAST_KEEP_HOURS = 24
COMPACTING = "edits.compacting"  # there while somebody compacts
LONGEST_COMPACTION = timedelta(hours=6)


@dataclass(frozen=True)
class LogEntry:
    seq: int
    edit: Edit
    source: str
    row: int
    batch_id: str
    ingested_at: datetime


class EditLog:
    """The log of one store. Reading methods take the newest version unless one is named; raise StoreError."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        # For `append_together`: what each slot holds before the entry `_next_seq`.
        self._held: dict[str, str | None] = {}
        self._next_seq = 0
        self._read_to = (0, 0)  # number of an entry and no more than its `seq`: where `history` ended last

    def version(self) -> int | None:
        """The newest version, which a round may name as its snapshot; None before the first ingest."""
        table = open_table(self._store, TABLE)
        return None if table is None else table.version()

    def history(self, version: int | None = None, *, since: int = 0) -> list[LogEntry]:
        """Every entry ever made, in log order; or those from number `since` on, and then little else is read."""
        table = open_table(self._store, TABLE, version=version)
        if table is None:
            return []
        first = self._seq_of(table, since)
        rows = read_from(self._store, table, column="seq", least=first) if first else read_table(self._store, table)
        if rows.num_rows:
            self._read_to = (since + rows.num_rows, pc.max(rows["seq"]).as_py() + 1)
        return _entries(_numbered(rows, first=since))

    def length(self, version: int | None = None) -> int:
        """How many entries there are; also of a version whose files `compact` has removed."""
        table = open_table(self._store, TABLE, version=version)
        return 0 if table is None else row_count(table)

    def live(self, version: int | None = None) -> list[LogEntry]:
        """The newest entry of each slot that is not retracted, in log order."""
        table = open_table(self._store, TABLE, version=version)
        if table is None:
            return []
        rows = _numbered(read_table(self._store, table))
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

    def newest(self, version: int | None = None) -> pa.Table:
        """The newest entry of each slot by the narrow columns only: slot_id, edit_id, op, seq (its number) and
        ingested_at."""
        table = open_table(self._store, TABLE, version=version)
        columns = ["seq", "slot_id", "edit_id", "op", "ingested_at"]
        if table is None:
            return pa.schema([EDITS.field(name) for name in columns]).empty_table()
        rows = _numbered(read_table(self._store, table, columns))
        last = rows.group_by("slot_id").aggregate([("seq", "max")])["seq_max"]
        return rows.take(last.sort())  # numbers are places

    def quarantined(self) -> int:
        """How many rows were ever refused."""
        table = open_table(self._store, QUARANTINE_TABLE)
        return 0 if table is None else row_count(table)

    def quarantine(self) -> list[tuple[str, Rejection]]:
        """(source, rejection) of every row ever refused, by source and row."""
        table = open_table(self._store, QUARANTINE_TABLE)
        if table is None:
            return []
        rows = read_table(self._store, table, ["source", "row", "reason", "raw"]).to_pylist()
        rows.sort(key=lambda row: (row["source"], row["row"]))
        return [(row["source"], Rejection(row["row"], row["reason"], row["raw"])) for row in rows]

    def append(self, batch: Batch, *, again: bool = False) -> Counts:
        """Append what is new in one batch; `appending` is the same for a stream of them."""
        with self.appending(again=again) as stream:
            stream.add(batch.columns())
            return stream.commit()

    def appending(self, *, again: bool = False) -> LogAppend:
        """A stream of batches that becomes one commit: refused rows go to quarantine/, then all edits appear at once.

        Appending what the log has heard changes nothing, so after OutcomeUnknown, or a crash anywhere, the same call is
        safe to repeat. With `again` rows speak although the log has heard them: what differs from the slots is
        appended, which is how an older answer is restored.
        """
        attempts = self._attempts(TABLE, EDITS)
        return LogAppend(self._store, TABLE, attempts=attempts, set_aside=self._set_aside, again=again)

    def compact(self, *, keep_hours: int = KEEP_HOURS) -> int:
        """Join the small files of both tables, and remove files that only versions older than `keep_hours` need or that
        a killed ingest left behind; how many were removed. What the log says does not change.

        Raises ConfigError for less than LEAST_KEEP_HOURS: an ingest may run that has not committed its files yet.
        """
        if keep_hours < LEAST_KEEP_HOURS:
            raise ConfigError(
                f"--keep-hours is {keep_hours}; ingests and rounds that run need at least {LEAST_KEEP_HOURS}."
            )
        with self._compacting():
            tables = [open_table(self._store, name) for name in (TABLE, QUARANTINE_TABLE)]
            return sum(compact(self._store, table, keep_hours=keep_hours) for table in tables if table is not None)

    def append_together(self, batches: Sequence[Batch]) -> list[Counts]:
        """Append what differs from the slots, one batch after another, in one commit: many small posts cost one.

        Every batch speaks, as with `again`, so each must have an id of its own; none may have rejections. What the
        slots hold is kept between calls, and of a log that moved only what is new is read."""
        for table in self._attempts(TABLE, EDITS):
            self._catch_up(table)
            slots, next_seq = ChainMap[str, str | None]({}, self._held), self._next_seq
            counts, tables = [], []
            for batch in batches:
                new, superseded, retracted = [], 0, 0
                for row, edit in batch.edits:
                    held, said = slots.get(edit.slot_id), edit.edit_id if edit.op == "upsert" else None
                    if said != held:
                        new.append((row, edit))
                        superseded += bool(held and said)
                        retracted += said is None
                        slots[edit.slot_id] = said
                unchanged = len(batch.edits) - len(new)
                counts.append(Counts(len(new), unchanged, superseded=superseded, retracted=retracted))
                rows = edit_rows(new)
                tables.append(_log_rows(rows, source=batch.source, batch_id=batch.batch_id, first_seq=next_seq))
                next_seq += len(new)
            if next_seq == self._next_seq:
                return counts
            try:
                commit(self._store, table, pa.concat_tables(tables), transactions=[one.batch_id for one in batches])
            except CommitLost:
                continue
            return counts
        raise AssertionError("attempts end with an error")

    def retract(
        self, slot_ids: Iterable[str], *, author: str | None = None, edit_id: str | None = None
    ) -> list[LogEntry]:
        """Empty slots and return the entries that were live in them; slots already empty are left alone, and those
        that another edit than `edit_id` fills, where it is given.

        One commit. Unlike a row of a file, a retraction made here speaks every time it is called.
        """
        wanted = set(slot_ids)
        for table in self._attempts(TABLE, EDITS):
            entries = [
                entry
                for entry in self.live(table.version())
                if entry.edit.slot_id in wanted and edit_id in (None, entry.edit.edit_id)
            ]
            if not entries:
                return []
            retractions = [
                (entry.seq, Edit(op="retract", prompt=entry.edit.prompt, subject=entry.edit.subject, author=author))
                for entry in entries
            ]
            first_seq = largest(self._store, table, "seq") + 1
            batch_id = _digest(RETRACT_SOURCE, first_seq, *(entry.edit.slot_id for entry in entries))
            rows = _log_rows(edit_rows(retractions), source=RETRACT_SOURCE, batch_id=batch_id, first_seq=first_seq)
            try:
                commit(self._store, table, rows, transactions=[batch_id])
            except CommitLost:
                continue
            return entries
        raise AssertionError("attempts end with an error")

    @contextmanager
    def _compacting(self) -> Iterator[None]:
        """One at a time: Delta lets two that overlap replace the same files, and the log would say everything twice."""
        if self._store.exists(COMPACTING) and _age(self._store.modified(COMPACTING)) > LONGEST_COMPACTION:
            self._store.remove(COMPACTING)  # of one that was killed
        try:
            self._store.create(COMPACTING, b"")
        except AlreadyExists:
            raise StoreError(
                f"{self._store.uri} is being compacted since {self._store.modified(COMPACTING):%H:%M} UTC; "
                "where that was killed, it can be run again 6 hours after it began."
            ) from None
        try:
            yield
        finally:
            self._store.remove(COMPACTING)

    def _attempts(self, name: str, schema: pa.Schema) -> Iterator[DeltaTable]:
        """The table, each time at its newest version."""
        table = make_table(self._store, name, schema)
        for attempt in range(MOST_ATTEMPTS):
            yield table
            time.sleep(random.uniform(0, 0.02 * min(attempt, 10)))
            refresh(self._store, table)
        raise StoreError(f"{self._store.uri}: others kept writing first; nothing of this call landed, run it again.")

    def _catch_up(self, table: DeltaTable) -> None:
        columns = ["seq", "slot_id", "edit_id", "op"]
        rows = read_from(self._store, table, columns, column="seq", least=self._next_seq)
        for row in rows.sort_by("seq").to_pylist():
            self._held[row["slot_id"]] = row["edit_id"] if row["op"] == "upsert" else None
            self._next_seq = row["seq"] + 1

    def _seq_of(self, table: DeltaTable, number: int) -> int:
        """No more than the `seq` of the entry with this number, and more than that of any before it."""
        if number == self._read_to[0]:
            return self._read_to[1]
        before = read_table(self._store, table, ["seq"])["seq"].sort()[:number]
        return int(before[-1].as_py()) + 1 if len(before) else 0

    def _set_aside(self, refused: Sequence[Refused]) -> None:
        """Write refused rows, each once, whether it comes again in the same batch or in a grown file."""
        moment, sources = datetime.now(UTC), sorted({one.source for one in refused})
        for table in self._attempts(QUARANTINE_TABLE, QUARANTINE):
            held = read_table(self._store, table, ["row_id"], where=pc.field("source").isin(sources))
            there = set(held["row_id"].to_pylist())
            rows = {
                row_id: {
                    "row_id": row_id,
                    "source": one.source,
                    "row": one.rejection.row,
                    "reason": one.rejection.reason,
                    "raw": one.rejection.raw,
                    "batch_id": one.batch_id,
                    "ingested_at": moment,
                }
                for one in refused
                if (row_id := _digest(one.source, one.rejection.row, one.rejection.raw)) not in there
            }
            if not rows:
                return
            new = pa.Table.from_pylist(list(rows.values()), schema=QUARANTINE)
            try:
                commit(self._store, table, new)
            except CommitLost:
                continue
            return


def _age(moment: datetime) -> timedelta:
    return datetime.now(UTC) - moment


def _log_rows(edits: pa.Table, *, source: str, batch_id: str, first_seq: int) -> pa.Table:
    count = edits.num_rows
    moment = pa.scalar(datetime.now(UTC), EDITS.field("ingested_at").type)
    columns = {
        "source": pa.repeat(source, count),
        "batch_id": pa.repeat(batch_id, count),
        "seq": pa.array(range(first_seq, first_seq + count), pa.int64()),
        "ingested_at": pa.repeat(moment, count),
    }
    for name, values in columns.items():
        edits = edits.append_column(name, values)
    return edits.select(EDITS.names).cast(EDITS)


def _numbered(rows: pa.Table, *, first: int = 0) -> pa.Table:
    """In log order, numbered without the gaps."""
    place, numbers = rows.schema.get_field_index("seq"), range(first, first + rows.num_rows)
    return rows.sort_by("seq").set_column(place, "seq", pa.array(numbers, pa.int64()))


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
