"""Tables as Parquet bytes that depend on their content alone, each with one JSON object describing it.

Matrices are read and written in blocks of rows: a block is a row group, and no more of a table need be in memory.
"""

import contextlib
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CorruptObject

# The only key we write into a file's metadata.
METADATA_KEY = b"wiseline"
PAGES_AHEAD = 2**18  # bytes


def encode_table(table: pa.Table, description: dict[str, Any]) -> bytes:
    """Parquet bytes of `table`; equal input gives equal bytes, so an object can be named and found by its content."""
    return encode_blocks([table], table.schema, description)


def encode_blocks(blocks: Iterable[pa.Table], schema: pa.Schema, description: dict[str, Any]) -> bytes:
    """Parquet bytes of a table that comes in blocks, each of them a row group."""
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), allow_nan=False)
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        schema.with_metadata({METADATA_KEY: text.encode()}),
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        for block in blocks:
            writer.write_table(block)
    return sink.getvalue()


def decode_table(data: bytes, what: str) -> tuple[pa.Table, dict[str, Any]]:
    """The table and its description; nothing is unpickled. Raises CorruptObject, naming `what`."""
    stored = StoredTable(io.BytesIO(data), what)
    with explained(what):
        return stored.file.read(use_threads=False), stored.description


class StoredTable:
    """A table that is read block by block. Raises CorruptObject, naming `what`, in every method."""

    def __init__(self, file: BinaryIO, what: str) -> None:
        self.what = what
        with explained(what):
            # Unasked, pyarrow fetches all row groups at once, and of a row group all pages.
            self.file = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False, buffer_size=PAGES_AHEAD)
            self.description: dict[str, Any] = json.loads(self.file.schema_arrow.metadata[METADATA_KEY])
        if not isinstance(self.description, dict):
            raise CorruptObject(f"{what} does not describe itself; it was not written by wiseline.")

    @property
    def rows(self) -> int:
        return int(self.file.metadata.num_rows)

    def blocks(self, rows: int) -> Iterator[pa.RecordBatch]:
        """Blocks of `rows` rows, however large the row groups are that the file was written in; the last has fewer."""
        with explained(self.what):
            yield from self.file.iter_batches(batch_size=rows, use_threads=False)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    try:
        yield
    # OSError: pyarrow's own word for a page that does not match its checksum.
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptObject(
            f"{what} cannot be decoded ({' '.join(str(error).split())}); restore it or roll back."
        ) from error
