import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.errors import CorruptObject, NewerSchema
from pipeline.storage import deltas
from pipeline.storage.deltas import (
    DeltaMetadata,
    DeltaRows,
    MemoryMetadata,
    SideMemory,
    StoredDelta,
    decode_matrix,
    decode_memory,
    encode_delta,
    encode_matrix,
    encode_memory,
)
from pipeline.storage.parquet import decode_table, encode_table

FLOATS = st.floats(width=32, allow_nan=False)


def delta_of(
    values: np.ndarray, row_lengths: list[int], *, columns: int, **changed: object
) -> tuple[DeltaMetadata, DeltaRows]:
    fields: dict[str, object] = {
        "model_fingerprint": "f" * 32,
        "layer": 3,
        "seed": 7,
        "mask_index": 1,
        "mask_count": 4,
        "masks": "disjoint",
        "density": 0.2,
        "dtype": "float32",
        "edits_digest": "e",
        "config_digest": "c",
        "rows": len(row_lengths),
        "columns": columns,
    }
    metadata = DeltaMetadata.model_validate(fields | changed)
    return metadata, DeltaRows(values.astype(np.float32), np.array(row_lengths, dtype=np.int32))


def decode_delta(data: bytes, *, rows: int = 3) -> tuple[DeltaMetadata, DeltaRows]:
    stored = StoredDelta(io.BytesIO(data))
    blocks = list(stored.blocks(rows))
    assert {len(block.row_lengths) for block in blocks[:-1]} <= {rows}
    return stored.metadata, DeltaRows(
        np.concatenate([block.values for block in blocks]), np.concatenate([block.row_lengths for block in blocks])
    )


def example() -> tuple[DeltaMetadata, DeltaRows]:
    random = np.random.default_rng(0)
    return delta_of(random.standard_normal(300), [100, 0, 120, 80], columns=128)


def memory(matrix: np.ndarray) -> SideMemory:
    rows, columns = matrix.shape
    return SideMemory(
        MemoryMetadata(
            model_fingerprint="f",
            layer=1,
            method="ties",
            shards=4,
            edits_digest="e",
            config_digest="c",
            rows=rows,
            columns=columns,
        ),
        matrix.astype(np.float32),
    )


@given(st.data(), st.lists(st.integers(0, 6), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_a_delta_comes_back_as_it_was(data: st.DataObject, row_lengths: list[int]) -> None:
    values = data.draw(arrays(np.float32, sum(row_lengths), elements=FLOATS))
    metadata, delta = delta_of(values, row_lengths, columns=6)
    stored_metadata, back = decode_delta(encode_delta(metadata, delta), rows=data.draw(st.integers(1, 9)))
    assert stored_metadata == metadata
    assert back.values.tobytes() == delta.values.tobytes()  # bit for bit: -0.0 too
    assert back.row_lengths.tolist() == row_lengths


def test_deltas_and_memories_lie_in_row_groups_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "BLOCK_ENTRIES", 300)
    for data in (encode_delta(*example()), encode_memory(memory(np.ones((4, 128))))):
        groups = pq.ParquetFile(io.BytesIO(data)).metadata
        assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [2, 2]


@pytest.mark.parametrize("group", [1, 3, 4])
def test_blocks_are_the_same_in_whatever_row_groups_a_delta_was_written(group: int) -> None:
    metadata, delta = delta_of(np.arange(20.0), [2] * 10, columns=128)
    table, _ = decode_table(encode_delta(metadata, delta), "it")
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=group)
    _, back = decode_delta(sink.getvalue(), rows=4)
    assert back.values.tolist() == delta.values.tolist()


@given(arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 5)), elements=FLOATS))
@settings(max_examples=40, deadline=None)
def test_matrices_and_memories_come_back_as_they_were(matrix: np.ndarray) -> None:
    back, description = decode_matrix(encode_matrix(matrix, {"edits": ["a"]}))
    assert back.tobytes() == matrix.tobytes()
    assert back.shape == matrix.shape
    assert description == {"edits": ["a"]}
    assert decode_memory(encode_memory(memory(matrix))).matrix.tobytes() == matrix.tobytes()


def test_equal_input_gives_equal_bytes_whatever_its_memory_layout() -> None:
    matrix = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
    assert encode_matrix(matrix) == encode_matrix(np.asfortranarray(matrix).copy(order="F"))
    assert encode_delta(*example()) == encode_delta(*example())
    assert encode_matrix(matrix) != encode_matrix(matrix, {"a": 1})


def test_a_damaged_byte_never_changes_a_value() -> None:
    """The checksum in the manifest finds every flip; without it the decoder finds those in the data pages itself."""
    metadata, delta = example()
    good = encode_delta(metadata, delta)
    found = 0
    for position in range(0, len(good), 7):
        bad = bytearray(good)
        bad[position] ^= 0x10
        try:
            _, back = decode_delta(bytes(bad))
        except CorruptObject:
            found += 1
        else:
            assert back.values.tobytes() == delta.values.tobytes()
    assert found > 100


@pytest.mark.parametrize("decode", [decode_delta, decode_memory, decode_matrix])
@pytest.mark.parametrize("data", [b"", b"PAR1", b"not parquet at all" * 10])
def test_what_is_not_parquet_is_corrupt(decode: object, data: bytes) -> None:
    with pytest.raises(CorruptObject):
        decode(data)  # type: ignore[operator]


def test_a_file_of_someone_else_or_of_another_kind_is_corrupt() -> None:
    foreign = encode_table(pa.table({"values": [1]}), {"kind": "elsewhere"})
    for data in (foreign, encode_matrix(np.zeros((2, 2), np.float32))):
        with pytest.raises(CorruptObject):
            decode_delta(data)
    with pytest.raises(CorruptObject, match="the wrong object"):
        decode_matrix(encode_delta(*example()))


def test_a_delta_that_does_not_fit_its_own_shape_is_corrupt() -> None:
    for changed in ({"rows": 5}, {"columns": 100}):
        table, fields = decode_table(encode_delta(*example()), "it")
        with pytest.raises(CorruptObject, match="shape"):
            decode_delta(encode_table(table, fields | changed))


def test_a_newer_schema_is_named_even_where_its_fields_are_unknown() -> None:
    table, fields = decode_table(encode_delta(*example()), "it")
    newer = encode_table(table, fields | {"schema_version": 99, "unheard_of": 1})
    with pytest.raises(NewerSchema, match="upgrade wiseline"):
        decode_delta(newer)
