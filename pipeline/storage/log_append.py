"""One ingest as one commit: batches are added as they are read, and nobody sees any of them before the commit.

While the stream flows its rows are written to data files; of each row only the ids stay in memory (40 bytes). At the
commit all rows are decided at once, in the order of the stream. The rare files that hold rows which are not new, or
that another ingest was quicker than, are written again then.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from pipeline.errors import StoreError
from pipeline.storage.batches import ColumnBatch, Counts, Rejection
from pipeline.storage.delta_table import CommitLost, commit_files, read_batches, was_committed
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.slot_table import Decided, Ids, Mask, SlotTable, decide, differ, ids_of
from pipeline.storage.staged_files import StagedFiles, constant

# Refused rows are set aside in commits of so many, before the good ones are committed.
REJECTIONS_HELD = 10_000
_NO_IDS: Ids = np.empty((0, 2), np.uint64)


@dataclass(frozen=True)
class Refused:
    source: str
    batch_id: str
    rejection: Rejection


# The table as it is now, the slots of its log, and how many entries it has.
LogState = tuple[DeltaTable, SlotTable, int]
SetAside = Callable[[list[Refused]], None]


class LogAppend:
    """A context: leaving it without `commit` leaves the log as it was. Every method raises StoreError.

    `again`: rows speak although the log has heard them.
    """

    def __init__(
        self,
        store: ObjectStore,
        name: str,
        *,
        attempts: Callable[[], Iterator[LogState]],
        set_aside: SetAside,
        again: bool = False,
    ) -> None:
        self._store, self._attempts, self._set_aside, self._again = store, attempts, set_aside, again
        self._table, self._log, next_seq = next(attempts())
        self._staged = StagedFiles(store, name, first_seq=next_seq, moment=datetime.now(UTC))
        self._batches: list[tuple[str, int]] = []  # id and number of good rows
        self._seen: set[str] = set()
        self._slots: list[Ids] = []
        self._contents: list[Ids] = []
        self._silent: list[Mask] = []
        self._rows = self._refused = 0
        self._rejections: list[Refused] = []
        self._heard: tuple[str, SlotTable] | None = None
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
        edit_ids, slots = ids_of(batch.edits["edit_id"]), ids_of(batch.edits["slot_id"])
        if self._again:
            silent = np.zeros(count, bool)
        elif batch.batch_id in self._seen or was_committed(self._table, batch.batch_id):
            silent = np.ones(count, bool)
        else:
            silent = self._heard_before(batch, edit_ids)
        retracts = pc.equal(batch.edits["op"], "retract").combine_chunks().to_numpy(zero_copy_only=False)
        self._slots.append(slots)
        self._contents.append(np.where(retracts[:, None], np.uint64(0), edit_ids))
        self._silent.append(silent)
        self._batches.append((batch.batch_id, count))
        self._seen.add(batch.batch_id)
        numbers = np.arange(self._rows, self._rows + count)
        self._rows += count
        if not silent.all():
            rows = batch.edits.append_column("source", constant(batch.source, count))
            rows = rows.append_column("batch_id", constant(batch.batch_id, count))
            self._staged.add(
                rows.filter(pa.array(~silent)) if silent.any() else rows, numbers[~silent] if silent.any() else numbers
            )

    def commit(self) -> Counts:
        """Make all that is new visible at once, and say what each row was.

        After OutcomeUnknown, or a crash anywhere, reading the same files again completes or recognises it.
        """
        self._flush_rejections()
        slots, contents = (np.concatenate([_NO_IDS, *part]) for part in (self._slots, self._contents))
        self._slots, self._contents = [slots], [contents]
        for table, log, next_seq in self._attempts():
            known = [not self._again and was_committed(table, batch_id) for batch_id, _ in self._batches]
            silent = np.concatenate([np.zeros(0, bool), *self._silent])
            silent |= np.repeat(known, [count for _, count in self._batches]).astype(bool)
            decided = decide(slots, contents, silent=silent, log=log)
            unknown = [batch_id for (batch_id, _), there in zip(self._batches, known, strict=True) if not there]
            if unknown:
                files = self._staged.settle(decided.new, first_seq=next_seq)
                self._may_be_committed = True
                try:
                    commit_files(self._store, table, files, transactions=unknown)
                except CommitLost:
                    self._may_be_committed = False
                    continue
            return self._counts(decided)
        raise AssertionError("attempts end with an error")

    def _heard_before(self, batch: ColumnBatch, edit_ids: Ids) -> Mask:
        """Rows that are the last thing the log heard from this row of this source: a file that grew is read from its
        start, but only its end is new; a file that is overwritten speaks where a row changed."""
        if self._heard is None or self._heard[0] != batch.source:
            seqs, rows, ids = [np.empty(0, np.int64)], [_NO_IDS], [_NO_IDS]
            where = pc.field("source") == batch.source
            for part in read_batches(self._store, self._table, ["seq", "row", "edit_id"], where=where):
                seqs.append(part["seq"].to_numpy())
                rows.append(_as_ids(part["row"]))
                ids.append(ids_of(part["edit_id"]))
            order = np.argsort(np.concatenate(seqs), kind="stable")
            self._heard = batch.source, SlotTable.newest(np.concatenate(rows)[order], np.concatenate(ids)[order])
        if not len(self._heard[1].slots):
            return np.zeros(len(edit_ids), bool)
        return ~differ(self._heard[1].held(_as_ids(batch.edits["row"])), edit_ids)

    def _flush_rejections(self) -> None:
        if self._rejections:
            self._set_aside(self._rejections)
        self._rejections = []

    def _counts(self, decided: Decided) -> Counts:
        new, duplicates = int(decided.new.sum()), int(decided.duplicate.sum())
        return Counts(
            ingested=new,
            unchanged=self._rows - new - duplicates,
            duplicates=duplicates,
            quarantined=self._refused,
            superseded=decided.superseded,
            retracted=decided.retracted,
        )


def _as_ids(rows: pa.Array | pa.ChunkedArray) -> Ids:
    """Row numbers in the shape of ids, to be looked up like them."""
    numbers = rows.to_numpy().astype(np.uint64)
    return np.stack([numbers, np.zeros_like(numbers)], axis=1)
