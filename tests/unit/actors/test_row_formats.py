import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.actors import row_formats
from pipeline.actors.checked_rows import edit_from_json
from pipeline.actors.row_formats import RawRow, read_csv, read_json, read_jsonl, read_rows
from pipeline.config import EditsSection
from pipeline.errors import BadEdit, CorruptObject, StoreError

GOOD = '{"prompt": "p", "target": "t"}'
LIMITS = EditsSection()


def accepted(rows: list[RawRow]) -> list[int]:
    """Numbers of the rows that say an edit; every other one is refused, whatever is in it."""
    numbers = []
    for row in rows:
        try:
            if not row.problem:
                edit_from_json(row.text, LIMITS)
                numbers.append(row.row)
        except BadEdit:
            pass
    return numbers


@given(st.binary(max_size=60).filter(lambda line: b"\n" not in line))
@settings(max_examples=300)
def test_no_line_of_a_jsonl_file_takes_its_neighbours_with_it(line: bytes) -> None:
    rows = list(read_jsonl("x.jsonl", io.BytesIO(b"\n".join([GOOD.encode(), line, GOOD.encode()]))))
    assert {1, 3} <= set(accepted(rows))
    assert len(rows) == (3 if line.strip() else 2)


@given(st.binary(max_size=60).filter(lambda line: b"\n" not in line))
@settings(max_examples=300)
def test_no_line_of_a_csv_file_takes_its_neighbours_with_it(line: bytes) -> None:
    data = b"\n".join([b"prompt,target", b"first,1", line, b"last,2", b'"quoted, too",3'])
    rows = list(read_csv("x.csv", io.BytesIO(data)))
    assert {2, 4, 5} <= set(accepted(rows))


@given(st.lists(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=5), max_size=4))
def test_no_value_in_a_json_array_takes_its_neighbours_with_it(values: list[object]) -> None:
    data = json.dumps([json.loads(GOOD), *values, json.loads(GOOD)]).encode()
    rows = list(read_json("x.json", io.BytesIO(data)))
    assert [row.row for row in rows] == list(range(1, len(values) + 3))
    assert accepted(rows) == [1, len(rows)]


def test_a_line_of_any_length_is_skipped_without_being_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_formats, "LARGEST_ROW", 50)
    data = GOOD.encode() + b"\n" + b"x" * 1000 + b"\n" + GOOD.encode()
    rows = list(read_jsonl("x.jsonl", io.BytesIO(data)))
    assert [(row.row, bool(row.problem)) for row in rows] == [(1, False), (2, True), (3, False)]


def test_objects_on_lines_under_the_name_json_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(read_rows("x.JSON", io.BytesIO(f"{GOOD}\n{{broken\n{GOOD}\n".encode())))
    assert accepted(rows) == [1, 3]
    assert len(rows) == 3


def test_bytes_that_are_not_utf8_are_refused_with_their_element_only() -> None:
    data = b'[{"prompt": "caf\xe9", "target": "t"}, ' + GOOD.encode() + b"]"
    assert accepted(list(read_json("x.json", io.BytesIO(data)))) == [2]


@pytest.mark.parametrize("name", ["edits.txt", "edits", "edits.jsonl.gz", "edits.csv.bak"])
def test_another_format_is_refused_with_those_that_are_read(name: str) -> None:
    with pytest.raises(StoreError, match=r"\.jsonl, \.ndjson, \.json, \.csv, \.parquet"):
        list(read_rows(name, io.BytesIO(b"")))


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        (b"name,age", "no column called prompt"),
        (b"prompt,target,prompt", "twice"),
        (b'"prompt,target', "cannot be read"),
        (b"pr\xe9mpt,target", "cannot be read"),
    ],
)
def test_a_csv_header_that_cannot_be_understood_refuses_the_file(header: bytes, sentence: str) -> None:
    with pytest.raises(CorruptObject, match=sentence):
        list(read_csv("x.csv", io.BytesIO(header + b"\na,b,c\n")))


def test_an_unclosed_quote_costs_one_line_of_a_long_file() -> None:
    lines = ["prompt,target", '"open,1', *(f"p{number},t" for number in range(1000))]
    rows = list(read_csv("x.csv", io.BytesIO("\n".join(lines).encode())))
    assert accepted(rows) == list(range(3, 1003))
