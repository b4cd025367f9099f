"""Data files of the edit log that are written while a stream is still being read, and seen by nobody before the commit.

They carry `seq` and so stand for a place in the log. Where that place or their rows turn out otherwise at the commit, a
file is written again; one file is held in memory at a time.
"""

import io
import json
import uuid
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake.transaction import AddAction

from pipeline.storage.object_store import ObjectStore
from pipeline.storage.schemas import EDITS

# A file is full at either; 2^17 rows of some 200 bytes are 20 MB of Parquet.
FILE_ROWS, FILE_BYTES = 2**17, 64 * 2**20
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
    """`rows`: which rows of the stream it holds."""

    path: str
    rows: npt.NDArray[np.int64]
    first_seq: int
    size: int
    stats: str

    def action(self, moment: datetime) -> AddAction:
        return AddAction(self.path, self.size, {}, int(moment.timestamp() * 1000), True, self.stats)


class StagedFiles:
    """Files of one stream, in its order, in the folder `table`; written by a thread beside the reading."""

    def __init__(self, store: ObjectStore, table: str, *, first_seq: int, moment: datetime) -> None:
        self._store, self._table, self._moment = store, table, moment
        self._first_seq = first_seq
        self._files: list[StagedFile] = []
        self._writing: deque[Future[StagedFile]] = deque()
        self._open: list[tuple[pa.Table, npt.NDArray[np.int64]]] = []
        self._thread = ThreadPoolExecutor(1)

    def add(self, rows: pa.Table, numbers: npt.NDArray[np.int64]) -> None:
        """`rows`, all columns but `seq` and `ingested_at`, which are rows `numbers` of the stream."""
        self._open.append((rows, numbers))
        if (
            sum(part.num_rows for part, _ in self._open) >= FILE_ROWS
            or sum(part.nbytes for part, _ in self._open) >= FILE_BYTES
        ):
            self._flush()

    def settle(self, new: npt.NDArray[np.bool_], *, first_seq: int) -> list[AddAction]:
        """Files that hold exactly the rows of the stream for which `new`, numbered from `first_seq`."""
        self._flush()
        self._collect(0)
        settled: list[StagedFile] = []
        for place, file in enumerate(self._files):
            wanted = new[file.rows]
            count = int(wanted.sum())
            if count < len(wanted) or file.first_seq != first_seq:
                self._files[place] = self._written_again(file, wanted, first_seq)
                self._store.remove(f"{self._table}/{file.path}")
            if count:
                settled.append(self._files[place])
            first_seq += count
        self._files = settled
        return [file.action(self._moment) for file in settled]

    def discard(self) -> None:
        """Remove what was written. Files of a process that was killed are removed by `EditLog.compact`."""
        self._collect(0)
        for file in self._files:
            self._store.remove(f"{self._table}/{file.path}")

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _flush(self) -> None:
        if not self._open:
            return
        rows = pa.concat_tables([part for part, _ in self._open])
        numbers = np.concatenate([part for _, part in self._open])
        self._open = []
        self._writing.append(self._thread.submit(self._write, rows, numbers, self._first_seq))
        self._first_seq += rows.num_rows
        self._collect(MOST_WAITING)

    def _collect(self, most: int) -> None:
        while len(self._writing) > most:
            self._files.append(self._writing.popleft().result())

    def _write(self, rows: pa.Table, numbers: npt.NDArray[np.int64], first_seq: int) -> StagedFile:
        count = rows.num_rows
        seq = pa.array(np.arange(first_seq, first_seq + count))
        rows = rows.append_column("seq", seq).append_column(
            "ingested_at", pa.repeat(pa.scalar(self._moment, EDITS.field("ingested_at").type), count)
        )
        data = _encode(rows.select(EDITS.names))
        path = f"part-{uuid.uuid4().hex}.snappy.parquet"
        self._store.put(f"{self._table}/{path}", data)
        return StagedFile(path, numbers, first_seq, len(data), _stats(rows))

    def _written_again(self, file: StagedFile, wanted: npt.NDArray[np.bool_], first_seq: int) -> StagedFile:
        if not wanted.any():
            return file
        rows = pq.read_table(io.BytesIO(self._store.read(f"{self._table}/{file.path}")))
        rows = rows.drop_columns(["seq", "ingested_at"]).filter(pa.array(wanted))
        return self._write(rows, file.rows[wanted], first_seq)


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
