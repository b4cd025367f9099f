"""JSONL, JSON, CSV and Parquet as a stream of raw rows, in which one bad row never hides the next.

A reader raises before its first row when the file as a whole cannot be read; from then on trouble belongs to a row.
JSONL, CSV and Parquet are read in bounded memory; a JSON array is one value and is loaded whole.
"""

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.actors.field_names import LIST_NAMES, PROMPT_NAMES
from pipeline.errors import CorruptObject, StoreError

LARGEST_ROW = 4 * 2**20
# An unclosed quote would swallow the rest of a CSV file; a record longer than this is taken for one.
MOST_LINES_PER_RECORD = 200
PARQUET_ROWS = 1000
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawRow:
    """One row as JSON `text`, or the `problem` that kept it from becoming that; `raw` is what stands in the file.

    `row` is what an editor or a viewer shows: the line where it starts (JSONL, CSV), else its place, from 1.
    """

    row: int
    text: bytes = b""
    raw: str = ""
    problem: str = ""


def read_rows(uri: str, file: BinaryIO) -> Iterator[RawRow]:
    """Rows of a file in its order, by its suffix. Raises CorruptObject or StoreError with a sentence about the file."""
    return format_of(uri)(uri, file)


def format_of(uri: str) -> Callable[[str, BinaryIO], Iterator[RawRow]]:
    suffix = PurePosixPath(uri).suffix.lower()
    if suffix not in FORMATS:
        raise StoreError(f"{uri} is not in a format wiseline reads; these are {', '.join(FORMATS)}.")
    return FORMATS[suffix]


def is_supported(uri: str) -> bool:
    return PurePosixPath(uri).suffix.lower() in FORMATS


def read_jsonl(uri: str, file: BinaryIO) -> Iterator[RawRow]:
    for number, line in _lines(file):
        if (row := line_row(number, line)) is not None:
            yield row


def line_row(number: int, line: bytes | None) -> RawRow | None:
    """What one line of JSONL says; None for a blank one. `line` is None where it is too long to hold."""
    if line is None or len(line) > LARGEST_ROW:
        return RawRow(number, problem=f"the row is larger than {LARGEST_ROW} bytes")
    return RawRow(number, text=line.strip()) if line.strip() else None


def read_json(uri: str, file: BinaryIO) -> Iterator[RawRow]:
    data = file.read().removeprefix(BYTE_ORDER_MARK)
    try:
        # Bytes that are not UTF-8 become lone surrogates, which only their own row is refused for.
        rows = json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        if data.lstrip()[:1] == b"{" and b"\n" in data.strip():  # one object per line under the wrong suffix
            yield from read_jsonl(uri, io.BytesIO(data))
            return
        raise CorruptObject(f"{uri} is not valid JSON ({error}); nothing of it was read.") from None
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list):
        raise CorruptObject(f"{uri} holds one {type(rows).__name__}, not an array of edits.")
    for number, row in enumerate(rows, start=1):
        yield _json_row(number, row)


def read_csv(uri: str, file: BinaryIO) -> Iterator[RawRow]:
    csv.field_size_limit(LARGEST_ROW)
    lines = _lines(file)
    header_line = next(((number, line) for number, line in lines if line is None or line.strip()), None)
    if header_line is None:
        return
    names = _header(uri, header_line[1])
    waiting: list[tuple[int, bytes | None]] = []
    while True:
        start = waiting.pop(0) if waiting else next(lines, None)
        if start is None:
            return
        number, first = start
        if first is None:
            yield RawRow(number, problem=f"the row is larger than {LARGEST_ROW} bytes")
            continue
        if not first.strip():
            continue
        record = [first]
        cells = _cells(first)
        following: list[tuple[int, bytes | None]] = []
        while cells == UNCLOSED and len(record) < MOST_LINES_PER_RECORD:
            more = waiting.pop(0) if waiting else next(lines, None)
            if more is None:
                break
            following.append(more)
            if more[1] is None:
                break
            record.append(more[1])
            cells = _cells(b"".join(record))
        if isinstance(cells, list) and len(cells) == len(names):
            fields = {name: _cell(name, text) for name, text in zip(names, cells, strict=True) if text.strip()}
            yield RawRow(number, text=_dumps(fields), raw=_readable(b"".join(record)))
            continue
        # Only the line that cannot be read is given up; the ones it seemed to reach into are read on their own.
        waiting = following + waiting
        problem = cells if isinstance(cells, str) else f"the row has {len(cells)} columns, the header {len(names)}"
        yield RawRow(number, raw=_readable(first), problem=problem)


def read_parquet(uri: str, file: BinaryIO) -> Iterator[RawRow]:
    parquet = open_parquet(uri, file)
    number = 0
    with broken_parquet(uri, lambda: number):
        for batch in parquet.iter_batches(batch_size=PARQUET_ROWS):
            for index in range(batch.num_rows):
                number += 1
                yield table_row(number, batch, index)


def open_parquet(uri: str, file: BinaryIO) -> pq.ParquetFile:
    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise CorruptObject(f"{uri} is not a Parquet file ({_first_line(error)}); nothing of it was read.") from None
    names = parquet.schema_arrow.names
    if len(set(names)) < len(names):
        raise CorruptObject(f"{uri} names a column twice ({', '.join(names)}); nothing of it was read.")
    _require_prompt(uri, names)
    return parquet


@contextlib.contextmanager
def broken_parquet(uri: str, rows_read: Callable[[], int]) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise CorruptObject(f"{uri} cannot be read after row {rows_read()} ({_first_line(error)}).") from None


def table_row(number: int, table: pa.Table | pa.RecordBatch, index: int) -> RawRow:
    """What row `index` of some columns says."""
    try:
        row = table.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return RawRow(number, problem="the text is not valid UTF-8")
    except (ValueError, OverflowError) as error:  # a date behind the year 9999, a record that names a field twice
        return RawRow(number, problem=f"the row cannot be read ({_first_line(error)})")
    return _json_row(number, row)


FORMATS: dict[str, Callable[[str, BinaryIO], Iterator[RawRow]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) of each line, from 1; None for a line too long to hold."""
    number = 0
    while line := file.readline(LARGEST_ROW + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if len(line) <= LARGEST_ROW:
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LARGEST_ROW)
        yield number, None


def _header(uri: str, line: bytes | None) -> list[str]:
    cells = UNCLOSED if line is None else _cells(line)
    if isinstance(cells, str):
        raise CorruptObject(f"{uri}: the header cannot be read ({cells}).")
    names = [cell.strip() for cell in cells]
    if len(set(names)) < len(names):
        raise CorruptObject(f"{uri}: the header names a column twice ({', '.join(names)}).")
    _require_prompt(uri, names)
    return names


def _require_prompt(uri: str, names: list[str]) -> None:
    if PROMPT_NAMES.isdisjoint(names):
        raise CorruptObject(f"{uri} has no column called prompt (it has {', '.join(names)}).")


UNCLOSED = "a quote is not closed"


def _cells(record: bytes) -> list[str] | str:
    """Cells of one CSV record, or why it has none."""
    try:
        text = record.decode()
    except UnicodeDecodeError:
        return "the text is not valid UTF-8"
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        return UNCLOSED if "unexpected end of data" in str(error) else f"not a CSV row: {error}"
    return rows[0] if len(rows) == 1 else "not a single CSV row"


def _cell(name: str, text: str) -> Any:
    """A cell's value: a JSON list where the field is one and the cell reads as one, else its text."""
    if name in LIST_NAMES and text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


def _json_row(number: int, row: object) -> RawRow:
    text = _dumps(row)
    if len(text) > LARGEST_ROW:
        return RawRow(number, raw=_readable(text), problem=f"the row is larger than {LARGEST_ROW} bytes")
    return RawRow(number, text=text)


def _dumps(row: object) -> bytes:
    """JSON in ASCII. What JSON has no word for (bytes, dates) becomes an object, which no field accepts."""
    return json.dumps(row, default=lambda value: {type(value).__name__: str(value)}).encode()


def _readable(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace").rstrip("\r\n")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
