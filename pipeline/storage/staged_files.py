"""Data files of the edit log that are written while a stream is still being read, and seen by nobody before the commit.

They are never changed. Where a row turns out not to be new at the commit, a copy without it is committed instead; the
file itself stays, so that the next try may decide otherwise.
"""

import io
import json
import uuid
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake.transaction import AddAction

from pipeline.errors import StoreError
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.schemas import EDITS

Mask = npt.NDArray[np.bool_]
# A file is full at either; 2^17 rows of some 200 bytes are 20 MB of Parquet.
FILE_ROWS, FILE_BYTES = 2**17, 64 * 2**20
# So many rows may others append while a stream is read, before its files have to be copied to a later place.
HEADROOM = 2**32
# Compaction removes what nobody refers to after 24 hours at the earliest.
LONGEST = timedelta(hours=12)
# Columns with few different values; of the others, which differ in every row, a dictionary would be thrown away.
FEW_VALUES = ["op", "author", "source", "batch_id", "locality.list.element.kind"]
IDS = ("edit_id", "slot_id")
NESTED = (
    "paraphrases.list.element",
    "locality.list.element.prompt",
    "locality.list.element.kind",
    "out_of_scope.list.element",
)
MOST_WAITING = 2


@dataclass(frozen=True)
class StagedFile:
    """Rows `first` to `first + count` of a stream whose row 0 has the number `base` in the log; a copy lacks some."""

    path: str
    first: int
    count: int
    base: int
    size: int
    stats: str


class StagedFiles:
    """Files of one stream, in its order, in the folder `table`; written by a thread beside the reading.

    `first_free`: the number of the log's next row.
    """

    def __init__(self, store: ObjectStore, table: str, *, first_free: int) -> None:
        self._store, self._table, self._moment = store, table, datetime.now(UTC)
        self._base = first_free + HEADROOM
        self._files: list[StagedFile] = []
        self._copies: dict[int, tuple[Mask, StagedFile]] = {}
        self._written: list[str] = []
        self._writing: deque[Future[StagedFile]] = deque()
        self._open: list[pa.Table] = []
        self._rows = 0
        self._thread = ThreadPoolExecutor(1)

    def add(self, rows: pa.Table) -> None:
        """The next rows of the stream, all columns but `seq` and `ingested_at`."""
        self._open.append(rows)
        if sum(part.num_rows for part in self._open) >= FILE_ROWS or sum(part.nbytes for part in self._open) >= (
            FILE_BYTES
        ):
            self._flush()

    def settle(self, new: Mask, *, first_free: int) -> list[AddAction]:
        """Files that hold exactly the rows of the stream for which `new`, behind all that the log holds.

        Raises StoreError when a file is gone, or may be soon.
        """
        if not self._rows:
            self._base = first_free
        self._flush()
        self._collect(0)
        if self._base < first_free:  # another long stream was quicker
            self._base = first_free + HEADROOM
        wanted = (new[file.first : file.first + file.count] for file in self._files)
        settled = [self._with_rows(place, rows) for place, rows in enumerate(wanted) if rows.any()]
        if datetime.now(UTC) - self._moment > LONGEST:
            raise StoreError(
                "This ingest took more than 12 hours; nothing of it landed: read its files in smaller parts."
            )
        if not all(self._store.exists(f"{self._table}/{file.path}") for file in settled):
            raise StoreError(
                f"Files of this ingest were removed from {self._store.uri}/{self._table} while it ran; nothing of it "
                "landed, run it again."
            )
        milliseconds = int(self._moment.timestamp() * 1000)
        return [AddAction(file.path, file.size, {}, milliseconds, True, file.stats) for file in settled]

    def discard(self, *, but: Collection[str] = ()) -> None:
        """Remove what was written. Files of a process that was killed are removed by `EditLog.compact`."""
        self.close()
        for path in set(self._written).difference(but):
            self._store.remove(f"{self._table}/{path}")

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _flush(self) -> None:
        if not self._open:
            return
        rows = pa.concat_tables(self._open)
        self._open = []
        numbers = np.arange(self._rows, self._rows + rows.num_rows)
        self._rows += rows.num_rows
        self._writing.append(self._thread.submit(self._write, rows, numbers, self._base))
        self._collect(MOST_WAITING)

    def _collect(self, most: int) -> None:
        while len(self._writing) > most:
            self._files.append(self._writing.popleft().result())

    def _with_rows(self, place: int, wanted: Mask) -> StagedFile:
        """The file, or a copy with the rows `wanted` alone and the place that the stream has now."""
        file = self._files[place]
        if wanted.all() and file.base == self._base:
            return file
        if place in self._copies:
            had, copy = self._copies[place]
            if copy.base == self._base and np.array_equal(had, wanted):
                return copy
        rows = pq.read_table(io.BytesIO(self._store.read(f"{self._table}/{file.path}")))
        rows = rows.drop_columns(["seq", "ingested_at"]).filter(pa.array(wanted))
        copy = self._write(rows, file.first + np.flatnonzero(wanted), self._base)
        self._copies[place] = wanted, copy
        return copy

    def _write(self, rows: pa.Table, numbers: npt.NDArray[np.int64], base: int) -> StagedFile:
        moment = pa.scalar(self._moment, EDITS.field("ingested_at").type)
        rows = rows.append_column("seq", pa.array(base + numbers))
        rows = rows.append_column("ingested_at", pa.repeat(moment, rows.num_rows))
        data = _encode(rows.select(EDITS.names))
        path = f"part-{uuid.uuid4().hex}.snappy.parquet"
        self._written.append(path)
        self._store.put(f"{self._table}/{path}", data)
        return StagedFile(path, int(numbers[0]), rows.num_rows, base, len(data), _stats(rows))


def constant(text: str, count: int) -> pa.DictionaryArray:
    """A column that says the same in every row, at 4 bytes a row."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([text]))


def _encode(rows: pa.Table) -> bytes:
    sink = io.BytesIO()
    # Hashes do not get smaller. Constant columns come as dictionaries; without the Arrow schema in the file they are
    # plain texts to every reader.
    compression = dict.fromkeys([*rows.column_names, *NESTED], "snappy") | dict.fromkeys(IDS, "none")
    pq.write_table(
        rows,
        sink,
        compression=compression,
        use_dictionary=FEW_VALUES,
        store_schema=False,
        write_statistics=["seq", "row"],
    )
    return sink.getvalue()


def _stats(rows: pa.Table) -> str:
    """What lets a reader skip the file, as Delta writes it."""
    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    for name in ("seq", "row", "source"):
        column = rows[name]
        if pa.types.is_dictionary(column.type):
            values = sorted({value for chunk in column.chunks for value in chunk.dictionary.to_pylist()})
        else:
            bounds = pc.min_max(column).as_py()
            values = [bounds["min"], bounds["max"]]
        low[name], high[name] = values[0], values[-1]
    return json.dumps({"numRecords": rows.num_rows, "minValues": low, "maxValues": high, "nullCount": {}})
