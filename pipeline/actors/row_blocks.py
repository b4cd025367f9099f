"""Files as blocks of rows in their order, each with the number of its first row: what one task checks.

A block of JSONL is bytes that end with a line, one of Parquet is columns; the other formats are read row by row.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.actors import row_formats
from pipeline.actors.row_formats import RawRow, format_of, open_parquet, read_jsonl, read_parquet

BLOCK_BYTES = 6 * 2**20
BLOCK_ROWS = 2**15
# Rows of the formats that are read one by one.
SINGLE_ROWS = 1000

Content: TypeAlias = bytes | pa.Buffer | list[RawRow]


@dataclass(frozen=True)
class Block:
    """`content`: lines of JSON (bytes), a table as an Arrow stream (a buffer), or rows."""

    first_row: int
    content: Content = field(repr=False)


def read_blocks(uri: str, file: BinaryIO) -> Iterator[Block]:
    """Raises CorruptObject or StoreError with a sentence about the file, as `read_rows` does."""
    read = format_of(uri)
    if read is read_jsonl:
        yield from _line_blocks(file)
    elif read is read_parquet:
        yield from _table_blocks(uri, file)
    else:
        rows = read(uri, file)
        while part := list(itertools.islice(rows, SINGLE_ROWS)):
            yield Block(part[0].row, part)


def to_buffer(table: pa.Table) -> pa.Buffer:
    """A table on its own: without what lies around a slice of it, and read again without a copy."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def from_buffer(buffer: pa.Buffer) -> pa.Table:
    return pa.ipc.open_stream(buffer).read_all()


def _line_blocks(file: BinaryIO) -> Iterator[Block]:
    number = 1
    while data := file.read(BLOCK_BYTES):
        if not data.endswith(b"\n"):
            data += file.readline(row_formats.LARGEST_ROW + 1)
            if not data.endswith(b"\n"):  # the end of the file, or a row that is larger than one may be
                while (rest := file.readline(row_formats.LARGEST_ROW)) and not rest.endswith(b"\n"):
                    pass
        if number == 1:
            data = data.removeprefix(row_formats.BYTE_ORDER_MARK)
        if data:  # a file may hold the mark alone
            yield Block(number, data)
        number += data.count(b"\n") + (not data.endswith(b"\n"))


def _table_blocks(uri: str, file: BinaryIO) -> Iterator[Block]:
    parquet = open_parquet(uri, file)
    number = 1
    with row_formats.broken_parquet(uri, lambda: number - 1):
        for batch in parquet.iter_batches(batch_size=_rows_at_once(parquet), use_threads=False):
            for start, rows in _pieces(batch):
                yield Block(number + start, to_buffer(rows))
            number += batch.num_rows


def _rows_at_once(parquet: pq.ParquetFile) -> int:
    """Rows of about BLOCK_BYTES, by what the file says of its row groups."""
    meta = parquet.metadata
    groups = [meta.row_group(index) for index in range(meta.num_row_groups)]
    widest = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1)
    return max(1, min(BLOCK_ROWS, int(BLOCK_BYTES / max(widest, 1))))


def _pieces(batch: pa.RecordBatch) -> Iterator[tuple[int, pa.Table]]:
    """The batch, cut where it turns out much larger than it should be: (first row, rows)."""
    count = max(1, min(batch.num_rows, -(-batch.nbytes // (4 * BLOCK_BYTES))))
    size = -(-batch.num_rows // count)
    for start in range(0, batch.num_rows, max(size, 1)):
        yield start, pa.Table.from_batches([batch.slice(start, size)])
