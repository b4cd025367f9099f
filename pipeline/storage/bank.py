"""The human half of the router bank: one Parquet row per edit, in the router's entry order."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CorruptObject

BANK_SCHEMA = pa.schema(
    [
        pa.field("edit_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("subject", pa.string()),
        pa.field("memory", pa.int32(), nullable=False),
        pa.field("target_ids", pa.list_(pa.int32()), nullable=False),
    ]
)


@dataclass(frozen=True)
class BankEntry:
    """An edit that can be reached, and the side memory that holds it."""

    edit_id: str
    prompt: str
    target: str
    subject: str | None
    memory: int
    target_ids: tuple[int, ...] = ()  # as asked bare, with the end of sequence


def encode_bank(entries: Sequence[BankEntry]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(entry) for entry in entries], schema=BANK_SCHEMA), sink)
    return sink.getvalue()


def decode_bank(data: bytes) -> list[BankEntry]:
    """Raises CorruptObject when the bytes are not a bank."""
    try:
        rows = pq.read_table(pa.BufferReader(data), schema=BANK_SCHEMA).to_pylist()
        return [BankEntry(**row | {"target_ids": tuple(row["target_ids"])}) for row in rows]
    except (pa.ArrowException, OSError, TypeError) as error:
        raise CorruptObject(f"The release's bank cannot be read ({error}); roll back to an older release.") from None
