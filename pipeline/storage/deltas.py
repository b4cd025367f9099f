"""Shard deltas, merged side memories and key matrices as Parquet bytes.

Shapes: D rows (d_model), F columns (d_ff), n trained entries or keys. A shard delta keeps its values only, row by row
in mask order; where they belong is the mask's business, which is regenerated from its seed. Deltas and memories lie in
row groups of `block_rows` rows, and are read and written block by block.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import CorruptObject
from pipeline.storage.parquet import StoredTable, decode_table, encode_blocks, encode_table
from pipeline.storage.schemas import DELTA, DELTA_VERSION, check_version, dense

FloatArray = NDArray[np.float32]
BLOCK_ENTRIES = 2**18  # matrix entries of a row block, at most: some shards of them fit into a cache


class DeltaMetadata(BaseModel):
    """What one shard's delta was computed from, and the shape it belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["delta"] = "delta"
    schema_version: int = DELTA_VERSION
    model_fingerprint: str
    layer: int
    seed: int
    mask_index: int
    mask_count: int
    masks: Literal["disjoint", "overlapping"]
    density: float
    dtype: str
    edits_digest: str
    config_digest: str
    rows: int
    columns: int


class MemoryMetadata(BaseModel):
    """What one merged side memory was computed from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["memory"] = "memory"
    schema_version: int = DELTA_VERSION
    model_fingerprint: str
    layer: int
    method: str
    shards: int
    edits_digest: str
    config_digest: str
    rows: int
    columns: int


@dataclass(frozen=True)
class DeltaRows:
    """ΔW of one shard, or a block of its rows: `values` [n] in mask order, of which the first `row_lengths[0]` belong
    to the first row, and so on."""

    values: FloatArray
    row_lengths: NDArray[np.int32]


@dataclass(frozen=True)
class SideMemory:
    """Merged ΔW, dense [D, F]."""

    metadata: MemoryMetadata
    matrix: FloatArray


def block_rows(columns: int) -> int:
    """Rows of a block of a matrix with so many columns: a power of two, so that blocks fit into row groups."""
    return int(2 ** (max(1, BLOCK_ENTRIES // columns).bit_length() - 1))


def encode_delta(metadata: DeltaMetadata, delta: DeltaRows) -> bytes:
    lengths = delta.row_lengths
    assert lengths.shape == (metadata.rows,), (lengths.shape, metadata.rows)
    assert int(lengths.sum()) == delta.values.size, (int(lengths.sum()), delta.values.size)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    values = pa.array(np.ascontiguousarray(delta.values, dtype=np.float32))
    rows = pa.ListArray.from_arrays(pa.array(offsets), values, type=DELTA.field("values").type)
    blocks = pa.Table.from_arrays([rows], schema=DELTA).to_batches(max_chunksize=block_rows(metadata.columns))
    return encode_blocks(map(_as_table, blocks), DELTA, metadata.model_dump(mode="json"))


class StoredDelta:
    """A shard's delta, read block by block. Every method raises CorruptObject or NewerSchema."""

    def __init__(self, file: BinaryIO) -> None:
        self._table = StoredTable(file, "The shard delta")
        self.metadata = _metadata(self._table.description, DeltaMetadata, self._table.what)
        if self._table.rows != self.metadata.rows:
            raise self._misfit()

    def blocks(self, rows: int) -> Iterator[DeltaRows]:
        """Blocks of `rows` rows from the top; the last may have fewer."""
        for block in self._table.blocks(rows):
            column = _only_column(block, self._table.what)
            lengths = np.diff(column.offsets.to_numpy()).astype(np.int32)
            if lengths.size and int(lengths.max()) > self.metadata.columns:
                raise self._misfit()
            yield DeltaRows(column.flatten().to_numpy(zero_copy_only=False), lengths)

    def _misfit(self) -> CorruptObject:
        shape = f"{self.metadata.rows} x {self.metadata.columns}"
        return CorruptObject(f"The shard delta does not fit its own shape {shape}.")


def encode_memory(memory: SideMemory) -> bytes:
    rows = block_rows(memory.metadata.columns)
    return encode_memory_blocks(
        memory.metadata, (memory.matrix[first : first + rows] for first in range(0, memory.metadata.rows, rows))
    )


def encode_memory_blocks(metadata: MemoryMetadata, blocks: Iterable[FloatArray]) -> bytes:
    """The memory whose matrix comes in blocks of rows, from the top; each becomes a row group."""
    return encode_blocks(map(_dense_table, blocks), dense(metadata.columns), metadata.model_dump(mode="json"))


def decode_memory(data: bytes) -> SideMemory:
    """Raises CorruptObject or NewerSchema."""
    table, fields = decode_table(data, "The side memory")
    metadata = _metadata(fields, MemoryMetadata, "The side memory")
    matrix = _dense_matrix(_only_column(table, "The side memory"), "The side memory")
    if matrix.shape != (metadata.rows, metadata.columns):
        raise CorruptObject(f"The side memory does not fit its own shape {metadata.rows} x {metadata.columns}.")
    return SideMemory(metadata, matrix)


def encode_matrix(matrix: FloatArray, description: Mapping[str, Any] | None = None) -> bytes:
    """Any float32 matrix [n, F] (routing keys, merge keys) with a JSON description of the caller's choice."""
    return encode_table(
        _dense_table(matrix),
        {
            "kind": "matrix",
            "schema_version": DELTA_VERSION,
            "columns": matrix.shape[1],
            "description": dict(description or {}),
        },
    )


def decode_matrix(data: bytes) -> tuple[FloatArray, dict[str, Any]]:
    """Raises CorruptObject or NewerSchema."""
    table, fields = decode_table(data, "The matrix")
    check_version(fields.get("schema_version"), DELTA_VERSION, "The matrix")
    if fields.get("kind") != "matrix":
        raise CorruptObject(f"The matrix is a {fields.get('kind')}; the wrong object lies at its path.")
    return _dense_matrix(_only_column(table, "The matrix"), "The matrix"), fields["description"]


Metadata = TypeVar("Metadata", DeltaMetadata, MemoryMetadata)


def _metadata(fields: Mapping[str, Any], expected: type[Metadata], what: str) -> Metadata:
    check_version(fields.get("schema_version"), DELTA_VERSION, what)
    try:
        return expected.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CorruptObject(f"{what} has unreadable metadata ({where}: {first['msg']}).") from None


def _only_column(table: Any, what: str) -> Any:
    """Of a table or a record batch."""
    if table.schema.names != ["values"] or table["values"].null_count:
        raise CorruptObject(f"{what} has the wrong columns.")
    column = table["values"]
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _as_table(batch: Any) -> Any:
    return pa.Table.from_batches([batch])


def _dense_table(matrix: FloatArray) -> Any:
    _rows, columns = matrix.shape
    values = pa.array(np.ascontiguousarray(matrix, dtype=np.float32).reshape(-1))
    schema = dense(columns)
    return pa.Table.from_arrays(
        [pa.FixedSizeListArray.from_arrays(values, type=schema.field("values").type)], schema=schema
    )


def _dense_matrix(rows: Any, what: str) -> FloatArray:
    if not pa.types.is_fixed_size_list(rows.type):
        raise CorruptObject(f"{what} is not a dense matrix.")
    matrix: FloatArray = rows.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), rows.type.list_size)
    return matrix
