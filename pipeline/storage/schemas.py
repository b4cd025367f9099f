"""Columns and schema versions of everything that is stored.

A version rises when a reader of the old one would misread the new one; adding a nullable column does not raise it.
"""

import pyarrow as pa

from pipeline.errors import NewerSchema

DELTA_VERSION = 1
RELEASE_VERSION = 3  # 2: routers with an encoder and a bias per entry; 3: live edits; older ones are still read

EDITS = pa.schema(
    [
        pa.field("edit_id", pa.string(), nullable=False),
        pa.field("slot_id", pa.string(), nullable=False),
        pa.field("op", pa.string(), nullable=False),  # upsert | retract
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("subject", pa.string()),
        pa.field("ground_truth", pa.string()),
        pa.field("paraphrases", pa.list_(pa.string())),
        pa.field("locality", pa.list_(pa.struct([("prompt", pa.string()), ("kind", pa.string())]))),
        pa.field("out_of_scope", pa.list_(pa.string())),
        pa.field("author", pa.string()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("batch_id", pa.string(), nullable=False),
        pa.field("seq", pa.int64(), nullable=False),  # rises over the whole log, with gaps
        pa.field("ingested_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)

# What a row of a file becomes before the log gives it its place.
CHECKED = pa.schema([field for field in EDITS if field.name not in ("source", "batch_id", "seq", "ingested_at")])

QUARANTINE = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),  # hash of source, row and raw: one line is kept once
        pa.field("source", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("raw", pa.string(), nullable=False),  # cut
        pa.field("batch_id", pa.string(), nullable=False),
        pa.field("ingested_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)

DELTA = pa.schema([pa.field("values", pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False)])


def dense(columns: int) -> pa.Schema:
    """A matrix with `columns` columns, one row per matrix row."""
    element = pa.field("element", pa.float32(), nullable=False)
    return pa.schema([pa.field("values", pa.list_(element, columns), nullable=False)])


def check_version(found: object, known: int, what: str) -> None:
    """Raises NewerSchema when `what` was written by a wiseline that knows more than this one."""
    if isinstance(found, int) and found > known:
        raise NewerSchema(f"{what} has schema version {found}, this wiseline reads up to {known}; upgrade wiseline.")
