"""Whatever a file holds: its rows checked as columns are its rows checked one by one."""

import io
import json
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.actors import row_blocks, row_formats
from pipeline.actors.checked_rows import CheckedRows, check, edit_from_json
from pipeline.actors.field_names import LOCALITY, OUT_OF_SCOPE, PARAPHRASES, TEXTS
from pipeline.actors.plain_text import folded, unclean
from pipeline.actors.row_blocks import read_blocks
from pipeline.actors.row_formats import read_rows
from pipeline.config import EditsSection
from pipeline.edits import normalise
from pipeline.errors import BadEdit, CorruptObject

LIMITS = EditsSection(max_prompt_chars=30, max_target_chars=12)
# What text differs by: blanks, quotes, controls, white space of other alphabets, letters that fold or compose.
ODD = [
    "",
    " ",
    "  ",
    "a",
    "A b",
    'say "x"',
    "back\\slash",
    "tab\tin",
    "line\n",
    "\x00",
    "\x7f",
    "\x1c",
    "\x85",
    "\xa0",
    "\u2003x",
]
ODD += [
    "é",
    "e\u0301",
    "ß",
    "ſ",
    "İ",
    "ς",
    "Σ",
    "ﬁ",
    "Ａ",
    "\u3000",
    "한",
    "\u1112\u1161",
    "हिन्दी",
    "Ǆ",
    "🦊",
    "\U00020000",
    "ⅷ",
    "²",
]
ODD += ["x" * 13, "x" * 31, "é" * 20, "2020-01-01", "null", "} null"]
TEXT = st.one_of(
    st.sampled_from(["Paris", "paris ", "Who leads Örland?", "Rome"]), st.sampled_from(ODD), st.text(max_size=6)
)
LOCALITY_ROW = st.fixed_dictionaries(
    {"prompt": TEXT}, optional={"kind": st.sampled_from(["unrelated", "same_subject", "far", None]), "more": st.just(1)}
)
WRONG = st.sampled_from([None, 7, 1.5, True, [], {}, [1], [None], {"prompt": "x"}, ["a", ["b"]], "x"])
VALUES: dict[str, Any] = {name: st.one_of(TEXT, TEXT, TEXT, WRONG) for names in TEXTS.values() for name in names}
VALUES |= {name: st.one_of(TEXT, st.lists(TEXT, max_size=3), WRONG) for name in (*PARAPHRASES, *OUT_OF_SCOPE)}
VALUES |= {
    name: st.one_of(TEXT, st.lists(LOCALITY_ROW, max_size=2), st.lists(TEXT, max_size=2), WRONG) for name in LOCALITY
}
VALUES["op"] = st.sampled_from(["upsert", "retract", "delete", "upsert ", None, 1])
VALUES["answers"] = st.one_of(TEXT, st.lists(TEXT, max_size=2))
VALUES["requested_rewrite"] = st.one_of(
    st.none(), st.fixed_dictionaries({"prompt": st.just("{} is"), "subject": TEXT, "target_new": st.just({"str": "t"})})
)
VALUES["note"] = st.one_of(TEXT, WRONG, st.just(10**30), st.just(float("nan")))
PLAIN = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["Who?", "Where, in  Örland?"]), "target": st.sampled_from(["x", "Ek"])}
)
ROWS = st.one_of(
    PLAIN,
    st.tuples(PLAIN, st.fixed_dictionaries({}, optional=VALUES)).map(lambda both: both[0] | both[1]),
    st.fixed_dictionaries({}, optional=VALUES),
)


def one_by_one(name: str, data: bytes, limits: EditsSection) -> list[tuple[Any, ...]]:
    told: list[tuple[Any, ...]] = []
    for row in read_rows(name, io.BytesIO(data)):
        problem = row.problem
        if not problem:
            try:
                edit = edit_from_json(row.text, limits)
                told.append((row.row, edit.model_dump(mode="json"), edit.edit_id, edit.slot_id))
            except BadEdit as error:
                problem = str(error)
        if problem:
            told.append((row.row, problem, (row.raw or row.text.decode("utf-8", "backslashreplace"))[:1000]))
    return told


def in_columns(name: str, data: bytes, limits: EditsSection) -> list[tuple[Any, ...]]:
    told: list[tuple[Any, ...]] = []
    for block in read_blocks(name, io.BytesIO(data)):
        told += flat(check(block, limits))
    return told


def flat(rows: CheckedRows) -> list[tuple[Any, ...]]:
    edits: list[tuple[Any, ...]] = []
    for row in rows.edits.to_pylist():
        number, edit_id, slot_id = (row.pop(name) for name in ("row", "edit_id", "slot_id"))
        edits.append((number, row, edit_id, slot_id))
    assert [edit[0] for edit in edits] == sorted(edit[0] for edit in edits)
    return sorted([*edits, *((bad.row, bad.reason, bad.raw) for bad in rows.rejections)], key=lambda told: told[0])


def same(name: str, data: bytes, limits: EditsSection = LIMITS) -> list[tuple[Any, ...]]:
    told = in_columns(name, data, limits)
    assert told == one_by_one(name, data, limits)
    return told


@given(st.lists(ROWS, max_size=8), st.booleans())
@settings(max_examples=600)
def test_rows_of_jsonl_say_the_same_as_columns(rows: list[Any], ascii_only: bool) -> None:
    lines = [json.dumps(row, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass") for row in rows]
    same("x.jsonl", b"\n".join(lines))


JUNK = [
    "{",
    "}",
    "[",
    "]",
    "null",
    "true",
    "1",
    '"',
    "\\",
    '"prompt"',
    ":",
    ",",
    " ",
    "\t",
    "\r",
    "\x0b",
    "\ufeff",
    "é",
    "\\ud83d",
]
JUNK += [
    '{"prompt": "a", "target": "b"}',
    '{"prompt": "a", "prompt": "c", "target": "b"}',
    "\\u0070",
    "NaN",
    '"target": "t"',
]


@given(
    st.lists(
        st.one_of(st.lists(st.sampled_from(JUNK), max_size=6).map("".join).map(str.encode), st.binary(max_size=20))
    )
)
@settings(max_examples=600)
@example([b'{"prompt": "a", "target": "b"} null', b'{"prompt": "a", "target": "b"}'])
@example([b'{"prompt": "a", "target": "b"}{"prompt": "c", "target": "d"}', b'{"prompt": "a",', b'"target": "b"}'])
@example([b'{"prompt": "a", "target": "b"} {"prompt": "c", "target": "d", "x":', b'{"y": 1}}'])
@example([b'{"prompt": "a", "target": "b"} {"x": [{}', b'{}], "prompt": "c", "target": "d"}'])
@example([b'{"prompt": "a", "target": "b"} {"x": {}', b'{"prompt": "c", "target": "d"}}'])
@example([b'{"prompt": "a", "target": "b"} null {"prompt": "c", "target": "d"}', b"{}"])
@example([b'{"prompt": "a", "target": "b", "x": ' + b"1" * 5000 + b"}"])
@example([b'{"prompt": "a", "target": "b", "x": ' + b"[" * 2000 + b"]" * 2000 + b"}"])
@example([b'{"pr\\u006fmpt": "a", "target": "b"}', b'{"prompt": "\\udc00", "target": "b"}'])
def test_lines_of_anything_say_the_same_as_columns(lines: list[bytes]) -> None:
    good = b'{"prompt": "Who?", "target": "x", "paraphrases": ["Whom?"]}'
    same("x.jsonl", b"\n".join([good, *lines, good]))


OBJECTS = [
    '{"prompt": "a", "target": "b"}',
    '{"prompt": "c", "target": "d", "x": {"y": 1}}',
    '{"prompt": "e", "target": "f", "paraphrases": ["g", "h"], "x": [{}, {}]}',
]


@given(st.lists(st.sampled_from(OBJECTS), min_size=1, max_size=5), st.data())
@settings(max_examples=600)
def test_objects_cut_and_joined_anywhere_say_the_same_as_columns(objects: list[str], data: st.DataObject) -> None:
    """Line ends at any token, none between objects: Arrow would read many of these."""
    tokens = re.findall(r'"[^"]*"|.', " ".join(objects))
    ends = st.sampled_from(["", "", "", "", "", "\n", "\n", "\r\n", " ", "\t\n", "\n\n"])
    joined = "".join(token + data.draw(ends) for token in tokens)
    same("x.jsonl", f"{OBJECTS[0]}\n{joined}\n{OBJECTS[1]}".encode())


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", b"\n", b"\xef\xbb\xbf{}"])
def test_files_with_next_to_nothing_in_them_say_the_same(data: bytes) -> None:
    assert len(same("x.jsonl", data)) == data.count(b"{")


def test_a_parquet_file_that_names_a_column_twice_is_refused_in_either_way() -> None:
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays([pa.array(["p"])] * 2 + [pa.array(["t"])], ["prompt", "prompt", "target"]), sink
    )
    for read in (read_rows, read_blocks):
        with pytest.raises(CorruptObject, match="names a column twice"):
            list(read("x.parquet", io.BytesIO(sink.getvalue())))  # type: ignore[operator]


def test_what_python_has_no_value_for_is_refused_row_by_row() -> None:
    twice = pa.StructArray.from_arrays([pa.array(["p", "q"])] * 3, ["prompt", "kind", "kind"])
    for name, column in {
        "locality": pa.ListArray.from_arrays([0, 1, 2], twice),
        "note": pa.array([10**18, 10**18], pa.timestamp("us")),
    }.items():
        sink = io.BytesIO()
        pq.write_table(pa.table({"prompt": ["p", "q"], "target": ["t", "t"], name: column}), sink)
        assert all("cannot be read" in row[1] for row in same("x.parquet", sink.getvalue()))


@given(st.lists(ROWS, min_size=1, max_size=8))
@settings(max_examples=600)
def test_rows_of_parquet_say_the_same_as_columns(rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(["prompt", *(name for row in rows for name in row)]))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):  # mixed: what most of them are, else text
            columns[name] = pa.array([value if isinstance(value, str) and _whole(value) else None for value in values])
    sink = io.BytesIO()
    try:
        pq.write_table(pa.table(columns), sink)
    except pa.ArrowNotImplementedError:  # a struct without fields
        return
    same("x.parquet", sink.getvalue())


def _whole(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def test_columns_of_other_types_say_the_same() -> None:
    text = pa.array(["p", "q", None])
    for prompt in (
        text.dictionary_encode(),
        text.cast(pa.large_string()),
        text.cast(pa.string_view()),
        text.cast(pa.binary()),
    ):
        sink = io.BytesIO()
        lists = pa.array([["a"], [], None], pa.large_list(pa.large_string()))
        pq.write_table(pa.table({"prompt": prompt, "target": ["x", "y", "z"], "paraphrases": lists}), sink)
        same("x.parquet", sink.getvalue())


def test_bytes_that_are_not_utf8_in_parquet_are_refused_in_either_way() -> None:
    broken = pa.array([b"p", b"caf\xe9", b"q"]).view(pa.string())
    for table in (
        pa.table({"prompt": broken, "target": ["t"] * 3}),
        pa.table({"prompt": ["p"] * 3, "target": ["t"] * 3, "note": broken}),
    ):
        sink = io.BytesIO()
        pq.write_table(table, sink)
        assert len([row for row in same("x.parquet", sink.getvalue()) if "UTF-8" in str(row[1])]) == 1


@pytest.mark.parametrize("size", [40, 60, 200])
def test_a_row_that_is_too_large_is_refused_in_either_way(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(row_formats, "LARGEST_ROW", 70)
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 30)
    rows = [{"prompt": "p", "target": "t", "note": "é" * (size // 6)}, {"prompt": "q", "target": "t"}] * 2
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    escaped, whole = (b"\n".join(json.dumps(row, ensure_ascii=to).encode() for row in rows) for to in (True, False))
    assert refused(same("x.jsonl", escaped)) == refused(same("x.parquet", sink.getvalue())) == [1, 3]
    assert refused(same("x.jsonl", whole + b"\n\n")) == ([1, 3] if size == 200 else [])


def refused(told: list[tuple[Any, ...]]) -> list[int]:
    return [row[0] for row in told if len(row) == 3]


def test_blocks_of_any_size_hold_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        b"\xef\xbb\xbf" + b'{"prompt": "p0", "target": "t"}',
        b"",
        *(b'{"prompt": "p%d", "target": "t"}' % n for n in range(40)),
        b"{",
    ]
    expected = one_by_one("x.jsonl", b"\n".join(lines), LIMITS)
    for size in (1, 7, 33, 100, 10_000):
        monkeypatch.setattr(row_blocks, "BLOCK_BYTES", size)
        assert same("x.jsonl", b"\n".join(lines)) == expected


def test_most_rows_of_ordinary_files_are_read_as_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "prompt": f"Who leads Örland {n}?",
            "target": "Ek",
            "rephrase": f'"Örland {n}"',
            "locality": [{"prompt": "2+2=", "kind": "unrelated"}],
        }
        for n in range(500)
    ]
    rows[77]["target"] = ""
    rows[300] = {"op": "retract", "prompt": "gone", "target": None}  # type: ignore[dict-item]
    single: list[bytes] = []
    real = edit_from_json
    monkeypatch.setattr(
        "pipeline.actors.checked_rows.edit_from_json", lambda text, limits: (single.append(text), real(text, limits))[1]
    )
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    assert len(in_columns("x.jsonl", data, EditsSection())) == 500
    assert len(single) < 2 * 64
    single.clear()
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    assert len(in_columns("x.parquet", sink.getvalue(), EditsSection())) == 500
    assert len(single) == 2


@given(st.lists(st.one_of(TEXT, st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), max_size=5))
@settings(max_examples=300)
def test_clean_texts_fold_as_slots_compare_them(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    column = pa.array(texts, pa.string())
    for text, dirty in zip(texts, unclean(column), strict=True):
        assert dirty == any(char < " " or (char.isspace() and char != " ") for char in text)
    clean = [text.strip() for text, dirty in zip(texts, unclean(column), strict=True) if not dirty]
    assert folded(pa.array(clean, pa.string())).to_pylist() == [normalise(text) for text in clean]


def test_every_character_folds_as_slots_compare_it() -> None:
    chars = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    clean = [char for char, dirty in zip(chars, unclean(pa.array(chars)), strict=True) if not dirty and char.strip()]
    assert folded(pa.array(clean)).to_pylist() == [normalise(char) for char in clean]
