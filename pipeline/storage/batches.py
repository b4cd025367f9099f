"""A batch of rows and its id, and what is counted of its rows.

What a row changes in the log, row by row in the order of a call:

1. A row is silent, and changes nothing, when the log knows its batch, or an earlier batch of the call is the same (then
   it counts as a duplicate), or the row is the last thing the log heard from this row of this source. So reading an old
   file again neither revives a retracted edit nor undoes a newer one. With `again` no row is silent.
2. A row that says what the last speaking row of the call said about its slot is a duplicate of that.
3. A row that says what its slot holds is unchanged. Any other row is new.

`slot_table.decide` does this for millions of rows at once.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.edits import Edit
from pipeline.storage.schemas import CHECKED


@dataclass(frozen=True)
class Rejection:
    """A row that cannot be accepted: where it stands, why, and what it says (cut)."""

    row: int
    reason: str
    raw: str


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one source in their order. `after` is the id of the batch before it in the same source."""

    source: str
    edits: tuple[tuple[int, Edit], ...]
    rejections: tuple[Rejection, ...] = ()
    after: str = ""

    @cached_property
    def batch_id(self) -> str:
        return self.columns().batch_id

    def columns(self) -> "ColumnBatch":
        return ColumnBatch(self.source, edit_rows(self.edits), self.rejections, self.after)


@dataclass(frozen=True)
class ColumnBatch:
    """A batch as columns: `edits` has the schema CHECKED."""

    source: str
    edits: pa.Table = field(repr=False)
    rejections: tuple[Rejection, ...] = ()
    after: str = ""

    @cached_property
    def batch_id(self) -> str:
        """Hash of [after, [edit ids], [what the refused rows say]] as JSON, put together without a list of the ids."""
        ids = self.edits["edit_id"].combine_chunks()
        joined = pc.binary_join(pa.ListArray.from_arrays(pa.array([0, len(ids)], pa.int32()), ids), '", "')[0].as_py()
        quoted = f'"{joined}"' if joined else ""
        raws = json.dumps([bad.raw for bad in self.rejections])
        return hashlib.blake2b(f'["{self.after}", [{quoted}], {raws}]'.encode(), digest_size=16).hexdigest()


def edit_rows(edits: Iterable[tuple[int, Edit]]) -> pa.Table:
    """(row, edit) one by one as columns of the schema CHECKED."""
    rows = [
        edit.model_dump(mode="json") | {"edit_id": edit.edit_id, "slot_id": edit.slot_id, "row": row}
        for row, edit in edits
    ]
    return pa.Table.from_pylist(rows, schema=CHECKED)


@dataclass(frozen=True)
class Counts:
    """Every row counts once in ingested, unchanged, duplicates or quarantined; the last two say more about ingested."""

    ingested: int = 0
    unchanged: int = 0
    duplicates: int = 0
    quarantined: int = 0
    superseded: int = 0
    retracted: int = 0

    @property
    def rows(self) -> int:
        return self.ingested + self.unchanged + self.duplicates + self.quarantined

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)})
