"""One ingest as one commit: batches are added as they are read, and nobody sees any of them before the commit.

While the stream flows its rows are written to data files; of each row only the ids stay in memory. What is new is
decided at the commit, for all rows at once, against the newest version of the log. Whoever commits in between makes
this commit fail; then what that one said is taken in, all is decided again, and the commit is tried again.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow.compute as pc
from deltalake import DeltaTable

from pipeline.errors import StoreError
from pipeline.storage.batches import ColumnBatch, Counts, Rejection
from pipeline.storage.delta_table import CommitLost, commit_files, committed_since, largest, read_batches, was_committed
from pipeline.storage.log_heard import ENTRY, Heard
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.slot_table import Ids, Mask, Numbers, by_id, decide, ids_of
from pipeline.storage.staged_files import StagedFiles, constant

# Refused rows are set aside in commits of so many, before the good ones are committed.
REJECTIONS_HELD = 10_000
_NO_IDS: Ids = np.empty((0, 2), np.uint64)


@dataclass(frozen=True)
class Refused:
    source: str
    batch_id: str
    rejection: Rejection


@dataclass(frozen=True)
class _Read:
    """A batch of the stream with `count` good rows."""

    batch_id: str
    source: str
    count: int


class LogAppend:
    """A context: leaving it without `commit` leaves the log as it was. Every method raises StoreError.

    `attempts` gives the table at its newest version, for a start and for each attempt to commit, and ends with an
    error; `again`: rows speak although the log has heard them.
    """

    def __init__(
        self,
        store: ObjectStore,
        name: str,
        *,
        attempts: Iterator[DeltaTable],
        set_aside: Callable[[list[Refused]], None],
        again: bool = False,
    ) -> None:
        self._store, self._attempts, self._set_aside, self._again = store, attempts, set_aside, again
        self._table = next(attempts)
        self._version = self._table.version()
        self._staged = StagedFiles(store, name, first_free=largest(store, self._table, "seq") + 1)
        self._batches: list[_Read] = []
        self._fresh: set[str] = set()
        # What stays in memory of the rows, a part for each batch.
        self._slots: list[Ids] = []
        self._edit_ids: list[Ids] = []
        self._retracts: list[Mask] = []
        self._places: list[Numbers] = []
        self._seen: set[str] = set()
        self._unchanged = self._duplicates = self._refused = 0
        self._rejections: list[Refused] = []
        self._may_be_committed = False

    def __enter__(self) -> "LogAppend":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._may_be_committed:
            with suppress(StoreError):  # what is left over is removed by EditLog.compact
                self._staged.discard()
        self._staged.close()

    def add(self, batch: ColumnBatch) -> None:
        """The next rows of the stream."""
        self._rejections += [Refused(batch.source, batch.batch_id, bad) for bad in batch.rejections]
        self._refused += len(batch.rejections)
        if len(self._rejections) >= REJECTIONS_HELD:
            self._flush_rejections()
        count = batch.edits.num_rows
        if batch.batch_id in self._seen and not self._again:
            self._duplicates += count
            return
        self._seen.add(batch.batch_id)
        # A batch that the log has stays there: its rows will not speak, whatever is decided later.
        if not self._again and self._is_known(batch):
            self._unchanged += count
            return
        self._batches.append(_Read(batch.batch_id, batch.source, count))
        self._slots.append(ids_of(batch.edits["slot_id"]))
        self._edit_ids.append(ids_of(batch.edits["edit_id"]))
        self._retracts.append(pc.equal(batch.edits["op"], "retract").to_numpy())
        self._places.append(batch.edits["row"].to_numpy().copy())  # or it would keep all of the batch in memory
        if count:
            rows = batch.edits.append_column("source", constant(batch.source, count))
            self._staged.add(rows.append_column("batch_id", constant(batch.batch_id, count)))

    def commit(self) -> Counts:
        """Make all that is new visible at once, and say what each row was.

        After OutcomeUnknown, or a crash anywhere, reading the same files again completes or recognises it.
        """
        self._flush_rejections()
        slots, edit_ids = _joined(self._slots, _NO_IDS), _joined(self._edit_ids, _NO_IDS)
        retracts = _joined(self._retracts, np.empty(0, bool))
        batch_ids = [one.batch_id for one in self._batches]
        counts = [one.count for one in self._batches]
        numbers = {source: number for number, source in enumerate(dict.fromkeys(one.source for one in self._batches))}
        source = np.repeat(np.array([numbers[one.source] for one in self._batches], np.int64), counts)
        row = _joined(self._places, np.empty(0, np.int64))
        heard = Heard(slots, edit_ids, sources=list(numbers), source=source, row=row)
        known = np.zeros(len(batch_ids), bool)  # or they would not be here
        order = by_id(slots)
        for table in self._attempts:
            heard.take_in(read_batches(self._store, table, ENTRY, where=pc.field("seq") >= heard.next_seq))
            if not self._again:
                meanwhile = committed_since(self._store, table, self._version)
                known |= np.array([one in meanwhile for one in batch_ids], bool)
            self._version = table.version()
            silent = np.repeat(known, counts) | (heard.silent & (not self._again))
            decided = decide(order, slots, edit_ids, retracts=retracts, silent=silent, held=heard.held)
            if not known.all():
                files = self._staged.settle(decided.new, first_free=heard.next_seq)
                self._may_be_committed = True
                try:
                    commit_files(self._store, table, files, transactions=batch_ids)
                except CommitLost:
                    self._may_be_committed = False
                    continue
                with suppress(StoreError):
                    self._staged.discard(but={file.path for file in files})
            new = int(decided.new.sum())
            return Counts(
                ingested=new,
                unchanged=self._unchanged + len(slots) - new - decided.duplicates,
                duplicates=self._duplicates + decided.duplicates,
                quarantined=self._refused,
                superseded=decided.superseded,
                retracted=decided.retracted,
            )
        raise AssertionError("attempts end with an error")

    def _is_known(self, batch: ColumnBatch) -> bool:
        """Whether the log had the batch when the stream began.

        A batch is only ever recorded with or after the one before it: behind a fresh one the log need not be searched.
        """
        if batch.after not in self._fresh and was_committed(self._store, self._table, batch.batch_id):
            return True
        self._fresh.add(batch.batch_id)
        return False

    def _flush_rejections(self) -> None:
        if self._rejections:
            self._set_aside(self._rejections)
        self._rejections = []


def _joined(parts: list[Any], nothing: Any) -> Any:
    """The parts as one array; they are given up for it."""
    whole = np.concatenate([nothing, *parts])
    parts.clear()
    return whole
