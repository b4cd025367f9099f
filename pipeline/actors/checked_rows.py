"""One block of rows, checked: the plain ones as columns, all others one by one, in the order of the file.

`plain=False` reads every row one by one; the result is the same.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.actors import row_formats
from pipeline.actors.field_names import canonical_fields
from pipeline.actors.json_lines import line_array, parse_lines
from pipeline.actors.plain_rows import plain_edits
from pipeline.actors.row_blocks import Block, from_buffer
from pipeline.actors.row_formats import RawRow, line_row, table_row
from pipeline.config import EditsSection
from pipeline.edits import Edit, parse_edit
from pipeline.errors import BadEdit, WiselineError
from pipeline.storage.batches import Rejection, edit_rows
from pipeline.storage.schemas import CHECKED

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
RAW_CHARS = 1000
# JSON takes at most so many times the bytes Arrow takes, beside the names and numbers of a row.
JSON_GROWTH, NUMBER_CHARS = 7, 200


@dataclass(frozen=True)
class CheckedRows:
    """`edits` has the schema CHECKED; edits and rejections are in the order of the file."""

    edits: pa.Table = field(repr=False)
    rejections: tuple[Rejection, ...] = ()


def check(block: Block, limits: EditsSection, *, plain: bool = True) -> CheckedRows:
    if isinstance(block.content, list):
        return _joined([], block.content, limits)
    if isinstance(block.content, bytes):
        return _check_lines(line_array(block.content), block.first_row, limits, plain=plain)
    return _check_table(from_buffer(block.content), block.first_row, limits, plain=plain)


def check_on_ray(block: Block | WiselineError, limits: EditsSection) -> CheckedRows:
    """`check` as a Ray task, which imports no more than it needs; a file's error, instead of a block, is raised."""
    if isinstance(block, WiselineError):
        raise block
    return check(block, limits)


def edit_from_json(text: bytes, limits: EditsSection) -> Edit:
    """The edit that one row says, whatever its field names. Raises BadEdit with the reason."""
    try:
        fields = json.loads(text.decode())
        json.dumps(fields, ensure_ascii=False).encode()  # lone surrogates: bytes that were not UTF-8, or \ud800
    except UnicodeError:
        raise BadEdit("the text is not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadEdit(f"broken JSON: {error}") from None
    return parse_edit(
        canonical_fields(fields), max_prompt_chars=limits.max_prompt_chars, max_target_chars=limits.max_target_chars
    )


def _check_lines(lines: pa.Array, first_row: int, limits: EditsSection, *, plain: bool) -> CheckedRows:
    left = np.ones(len(lines), bool)
    parts: list[pa.Table] = []
    for places, columns in parse_lines(lines, largest=row_formats.LARGEST_ROW) if plain else ():
        good, edits = plain_edits(columns, places + first_row, limits)
        parts.append(edits)
        left[places[good]] = False
    rows = (line_row(first_row + int(place), lines[int(place)].as_py()) for place in np.flatnonzero(left))
    return _joined(parts, filter(None, rows), limits)


def _check_table(table: pa.Table, first_row: int, limits: EditsSection, *, plain: bool) -> CheckedRows:
    left = np.ones(table.num_rows, bool)
    parts: list[pa.Table] = []
    if plain and all(_is_flat(field.type) for field in table.schema) and _is_valid(table):
        left = _may_be_large(table)
        places = np.flatnonzero(~left)
        columns = table if len(places) == table.num_rows else table.take(pa.array(places))
        good, edits = plain_edits(columns, places + first_row, limits)
        parts.append(edits)
        left[places[~good]] = True
    rows = (table_row(first_row + int(place), table, int(place)) for place in np.flatnonzero(left))
    return _joined(parts, rows, limits)


def _joined(parts: list[pa.Table], others: Iterable[RawRow], limits: EditsSection) -> CheckedRows:
    singles: list[tuple[int, Edit]] = []
    rejections: list[Rejection] = []
    for row in others:
        problem = row.problem
        if not problem:
            try:
                singles.append((row.row, edit_from_json(row.text, limits)))
            except BadEdit as error:
                problem = str(error)
        if problem:
            raw = row.raw or row.text.decode("utf-8", "backslashreplace")
            rejections.append(Rejection(row.row, problem, raw[:RAW_CHARS]))
    if singles:
        parts = [*parts, edit_rows(singles)]
    edits = pa.concat_tables([CHECKED.empty_table(), *parts])
    if len(parts) > 1:
        edits = edits.take(pa.array(np.argsort(edits["row"].to_numpy(), kind="stable")))
    return CheckedRows(edits, tuple(rejections))


def _is_flat(kind: pa.DataType) -> bool:
    """A column whose values say their size, so that `_may_be_large` can tell."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        items = kind.value_type
        fields = [field.type for field in items] if pa.types.is_struct(items) else [items]
        return all(pa.types.is_string(item) or pa.types.is_large_string(item) for item in fields)
    return bool(
        pa.types.is_null(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
    )


def _is_valid(table: pa.Table) -> bool:
    try:
        table.validate(full=True)
    except pa.ArrowInvalid:  # bytes that are not UTF-8
        return False
    return True


def _may_be_large(table: pa.Table) -> Mask:
    """Rows whose JSON may be larger than a row may be."""
    beside = sum(6 * len(name) + NUMBER_CHARS for name in table.column_names)
    large = np.zeros(table.num_rows, bool)
    for start, count in _halved(table, 0, table.num_rows, beside):
        large[start : start + count] = True
    return large


def _halved(table: pa.Table, start: int, count: int, beside: int) -> Iterator[tuple[int, int]]:
    if count * beside + JSON_GROWTH * table.nbytes <= row_formats.LARGEST_ROW or not count:
        return
    if count == 1:
        yield start, 1
        return
    middle = count // 2
    yield from _halved(table.slice(0, middle), start, middle, beside)
    yield from _halved(table.slice(middle), start + middle, count - middle, beside)
