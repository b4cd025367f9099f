"""Tables as Parquet bytes that depend on their content alone, each with one JSON object describing it."""

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CorruptObject

# The only key we write into a file's metadata.
METADATA_KEY = b"wiseline"


def encode_table(table: pa.Table, description: dict[str, Any]) -> bytes:
    """Parquet bytes of `table`; equal input gives equal bytes, so an object can be named and found by its content."""
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), allow_nan=False)
    sink = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata({METADATA_KEY: text.encode()}),
        sink,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    return sink.getvalue()


def decode_table(data: bytes, what: str) -> tuple[pa.Table, dict[str, Any]]:
    """The table and its description; nothing is unpickled. Raises CorruptObject, naming `what`."""
    try:
        table = pq.read_table(io.BytesIO(data), page_checksum_verification=True, use_threads=False)
        description = json.loads(table.schema.metadata[METADATA_KEY])
    # OSError: pyarrow's own word for a page that does not match its checksum.
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptObject(
            f"{what} cannot be decoded ({' '.join(str(error).split())}); restore it or roll back."
        ) from error
    if not isinstance(description, dict):
        raise CorruptObject(f"{what} does not describe itself; it was not written by wiseline.")
    return table, description
