"""Shard deltas, merged side memories and key matrices as Parquet bytes.

Shapes: D rows (d_model), F columns (d_ff), n trained entries or keys. A shard delta keeps its values only, row by row
in mask order; where they belong is the mask's business, which is regenerated from its seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import CorruptObject
from pipeline.storage.parquet import decode_table, encode_table
from pipeline.storage.schemas import DELTA, DELTA_VERSION, check_version, dense

FloatArray = NDArray[np.float32]


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
class ShardDelta:
    """ΔW of one shard: `values` [n] in mask order, of which the first `row_lengths[0]` belong to row 0, and so on."""

    metadata: DeltaMetadata
    values: FloatArray
    row_lengths: NDArray[np.int32]


@dataclass(frozen=True)
class SideMemory:
    """Merged ΔW, dense [D, F]."""

    metadata: MemoryMetadata
    matrix: FloatArray


def encode_delta(delta: ShardDelta) -> bytes:
    lengths = delta.row_lengths
    assert lengths.shape == (delta.metadata.rows,), (lengths.shape, delta.metadata.rows)
    assert int(lengths.sum()) == delta.values.size, (int(lengths.sum()), delta.values.size)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    values = pa.array(np.ascontiguousarray(delta.values, dtype=np.float32))
    rows = pa.ListArray.from_arrays(pa.array(offsets), values, type=DELTA.field("values").type)
    return encode_table(pa.Table.from_arrays([rows], schema=DELTA), delta.metadata.model_dump(mode="json"))


def decode_delta(data: bytes) -> ShardDelta:
    """Raises CorruptObject or NewerSchema."""
    rows, metadata = _decode(data, DeltaMetadata, "The shard delta")
    lengths = np.diff(rows.offsets.to_numpy()).astype(np.int32)
    values = rows.flatten().to_numpy(zero_copy_only=False)
    if lengths.size != metadata.rows or (lengths.size and int(lengths.max()) > metadata.columns):
        raise CorruptObject(f"The shard delta does not fit its own shape {metadata.rows} x {metadata.columns}.")
    return ShardDelta(metadata, values, lengths)


def encode_memory(memory: SideMemory) -> bytes:
    shape = (memory.metadata.rows, memory.metadata.columns)
    assert memory.matrix.shape == shape, (memory.matrix.shape, shape)
    return encode_table(_dense_table(memory.matrix), memory.metadata.model_dump(mode="json"))


def decode_memory(data: bytes) -> SideMemory:
    """Raises CorruptObject or NewerSchema."""
    rows, metadata = _decode(data, MemoryMetadata, "The side memory")
    matrix = _dense_matrix(rows, "The side memory")
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


def _decode(data: bytes, expected: type[Metadata], what: str) -> tuple[Any, Metadata]:
    table, fields = decode_table(data, what)
    check_version(fields.get("schema_version"), DELTA_VERSION, what)
    try:
        metadata = expected.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CorruptObject(f"{what} has unreadable metadata ({where}: {first['msg']}).") from None
    return _only_column(table, what), metadata


def _only_column(table: Any, what: str) -> Any:
    if table.column_names != ["values"] or table["values"].null_count:
        raise CorruptObject(f"{what} has the wrong columns.")
    return table["values"].combine_chunks()


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
