"""Lines of JSON as columns, as far as Arrow's parser and Python's `json` cannot differ about them.

Arrow refuses a whole block for one line it does not like. Then the halves of the block are tried, down to a few lines,
which are left to be read one by one. What Arrow would take in another way than Python is left before.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from pipeline.actors.field_names import LOCALITY, OUT_OF_SCOPE, PARAPHRASES, ROME
from pipeline.actors.plain_rows import KNOWN

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
SAMPLES = 16
# A block that Arrow refuses is halved until it has so few lines.
FEW_LINES = 32
# Python's json gives up on nesting at the recursion limit (1000) and on integers at 4300 digits; Arrow does not.
LONG_LINE, MOST_BRACKETS, LONG_NUMBER = 900, 200, re.compile(rb"[0-9]{4000}")
# A null behind a complete object ends the process in Arrow's parser (pyarrow 26.0).
NULL_BEHIND_OBJECT = r"\}\s*null"
LIST, LOCALITY_LIST = pa.list_(pa.string()), pa.list_(pa.struct([("prompt", pa.string()), ("kind", pa.string())]))
PLURAL = frozenset({"paraphrases", "paraphrase_prompts", "neighborhood_prompts", "out_of_scope"})


def line_array(data: bytes) -> pa.Array:
    """The lines of `data` with their ends, without copying them."""
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
    if not len(ends) or ends[-1] < len(data):
        ends = np.append(ends, len(data))
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.Array.from_buffers(pa.binary(), len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def parse_lines(lines: pa.Array, *, largest: int) -> Iterator[tuple[Numbers, pa.Table]]:
    """Columns of the lines that Arrow can be trusted with, in parts: (their places, one row each)."""
    trusted = _trusted(lines, largest)
    places = np.flatnonzero(trusted)
    if len(places):
        chosen = lines if len(places) == len(lines) else lines.filter(pa.array(trusted))
        offsets = np.frombuffer(chosen.buffers()[1], np.int32, len(chosen) + 1)
        yield from _parsed(chosen.buffers()[2], offsets, places)


def _parsed(data: pa.Buffer, offsets: npt.NDArray[np.int32], places: Numbers) -> Iterator[tuple[Numbers, pa.Table]]:
    start, end = int(offsets[0]), int(offsets[-1])
    block = data.slice(start, end - start)
    sampled = np.unique(np.linspace(0, len(places) - 1, SAMPLES).astype(int))
    schema, tidy = _schema([data[int(offsets[place]) : int(offsets[place + 1])].to_pybytes() for place in sampled])
    for unexpected in ("infer", "ignore") if tidy else ("ignore",):
        table = _table(block, schema if unexpected == "infer" else _with_all_names(schema), unexpected)
        # Every line is one object or more (see `_trusted`); where there are as many as lines, each line is one.
        if table is not None and table.num_rows == len(places):
            yield places, table
            return
    if len(places) > FEW_LINES:
        middle = len(places) // 2
        yield from _parsed(data, offsets[: middle + 1], places[:middle])
        yield from _parsed(data, offsets[middle:], places[middle:])


def _table(block: pa.Buffer, schema: pa.Schema, unexpected: str) -> pa.Table | None:
    options = pj.ParseOptions(explicit_schema=schema, newlines_in_values=False, unexpected_field_behavior=unexpected)
    try:
        return pj.read_json(
            pa.BufferReader(block), pj.ReadOptions(use_threads=False, block_size=block.size + 1), options
        )
    except (pa.ArrowException, UnicodeDecodeError):
        return None


def _trusted(lines: pa.Array, largest: int) -> Mask:
    data = lines.buffers()[2]
    offsets = np.frombuffer(lines.buffers()[1], np.int32, len(lines) + 1)
    lengths = np.diff(offsets)
    chars = np.frombuffer(data, np.uint8)
    first, last = offsets[:-1], offsets[1:] - 1
    for end in b"\n\r":
        last = np.maximum(last - (chars[last] == end), first)
    # No object of JSON goes on behind a line that ends with } on one that begins with {: a comma would be missing.
    trusted: Mask = (chars[first] == ord("{")) & (chars[last] == ord("}")) & (lengths <= largest)
    try:
        lines.cast(pa.string())
    except pa.ArrowInvalid:
        trusted &= np.array([_is_utf8(line) for line in lines.to_pylist()])
    whole = data.to_pybytes()
    for sign, pattern in ((b"\\", r"\\u[dD]"), (b"null", NULL_BEHIND_OBJECT)):  # halves of characters
        if sign in whole:
            trusted &= ~pc.match_substring_regex(lines, pattern).to_numpy(zero_copy_only=False)
    for place in np.flatnonzero(lengths > LONG_LINE):
        line = lines[int(place)].as_py()
        if line.count(b"[") + line.count(b"{") > MOST_BRACKETS or LONG_NUMBER.search(line):
            trusted[place] = False
    return trusted


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _schema(samples: Sequence[bytes]) -> tuple[pa.Schema, bool]:
    """Types of the known fields as most of the samples have them, and whether they have no others."""
    kinds: dict[str, Counter[pa.DataType]] = {}
    tidy = True
    for line in samples:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        for name, value in row.items() if isinstance(row, dict) else ():
            tidy = tidy and name in KNOWN
            if name in KNOWN and value is not None and not (isinstance(value, list) and not value):
                kinds.setdefault(name, Counter())[_kind(name, value)] += 1
    return pa.schema([(name, counts.most_common(1)[0][0]) for name, counts in kinds.items()]), tidy


def _with_all_names(schema: pa.Schema) -> pa.Schema:
    others = sorted(KNOWN.difference(schema.names))
    return pa.schema([*schema, *((name, _kind(name, [] if name in PLURAL else "")) for name in others)])


def _kind(name: str, value: object) -> pa.DataType:
    if name == ROME:
        return pa.null()  # an object: refused, and left
    if isinstance(value, list) and name in (*PARAPHRASES, *LOCALITY, *OUT_OF_SCOPE):
        return LOCALITY_LIST if name in LOCALITY and value and isinstance(value[0], dict) else LIST
    if name == "locality" and not value:
        return LOCALITY_LIST
    return pa.string()
