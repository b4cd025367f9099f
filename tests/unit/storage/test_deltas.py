import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.errors import CorruptObject, NewerSchema
from pipeline.storage.deltas import (
    DeltaMetadata,
    MemoryMetadata,
    ShardDelta,
    SideMemory,
    decode_delta,
    decode_matrix,
    decode_memory,
    encode_delta,
    encode_matrix,
    encode_memory,
)
from pipeline.storage.parquet import decode_table, encode_table

FLOATS = st.floats(width=32, allow_nan=False)


def delta_of(values: np.ndarray, row_lengths: list[int], *, columns: int, **changed: object) -> ShardDelta:
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
    return ShardDelta(metadata, values.astype(np.float32), np.array(row_lengths, dtype=np.int32))


def example() -> ShardDelta:
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
    delta = delta_of(values, row_lengths, columns=6)
    back = decode_delta(encode_delta(delta))
    assert back.metadata == delta.metadata
    assert back.values.tobytes() == delta.values.tobytes()  # bit for bit: -0.0 too
    assert back.row_lengths.tolist() == row_lengths


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
    assert encode_delta(example()) == encode_delta(example())
    assert encode_matrix(matrix) != encode_matrix(matrix, {"a": 1})


def test_a_damaged_byte_never_changes_a_value() -> None:
    """The checksum in the manifest finds every flip; without it the decoder finds those in the data pages itself."""
    delta = example()
    good = encode_delta(delta)
    found = 0
    for position in range(0, len(good), 7):
        bad = bytearray(good)
        bad[position] ^= 0x10
        try:
            back = decode_delta(bytes(bad))
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
        decode_matrix(encode_delta(example()))


def test_a_delta_that_does_not_fit_its_own_shape_is_corrupt() -> None:
    for changed in ({"rows": 5}, {"columns": 100}):
        table, fields = decode_table(encode_delta(example()), "it")
        with pytest.raises(CorruptObject, match="shape"):
            decode_delta(encode_table(table, fields | changed))


def test_a_newer_schema_is_named_even_where_its_fields_are_unknown() -> None:
    table, fields = decode_table(encode_delta(example()), "it")
    newer = encode_table(table, fields | {"schema_version": 99, "unheard_of": 1})
    with pytest.raises(NewerSchema, match="upgrade wiseline"):
        decode_delta(newer)
