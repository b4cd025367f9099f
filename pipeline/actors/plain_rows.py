"""Rows that are plainly good, a column at a time: what `canonical_fields`, `parse_edit` and the ids say of them.

Those say what an edit is, row by row. This file only knows which rows they cannot refuse and cannot read in a second
way, and does the same to all of these at once. Whatever else it meets, it leaves to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.actors.field_names import LOCALITY, OUT_OF_SCOPE, PARAPHRASES, ROME, TEXTS
from pipeline.actors.plain_text import Mask, characters, folded, unclean
from pipeline.config import EditsSection
from pipeline.edits import LocalityKind
from pipeline.storage.schemas import CHECKED

LISTS = (*PARAPHRASES, *LOCALITY, *OUT_OF_SCOPE)
KNOWN = frozenset({*(name for names in TEXTS.values() for name in names), *LISTS, ROME})
ID_BYTES = 16
_HEX = np.frombuffer("".join(f"{byte:02x}" for byte in range(256)).encode(), np.uint16)


@dataclass(frozen=True)
class _Listed:
    """Texts of several rows: the row of each, and for locality its kind."""

    rows: npt.NDArray[np.int64]
    texts: pa.Array
    kinds: pa.Array | None = None


def plain_edits(columns: pa.Table, numbers: npt.NDArray[np.int64], limits: EditsSection) -> tuple[Mask, pa.Table]:
    """Which rows are plain, and those as columns of the schema CHECKED.

    `columns`: one per field, under the names of the file, of valid UTF-8; a null is a field that is not there.
    `numbers`: the row's number in the file.
    """
    names = [field.name for field in columns.schema if field.name in KNOWN and not pa.types.is_null(field.type)]
    given = {name: _unchunked(columns[name]) for name in names}
    rows = _Rows(columns.num_rows)
    for name in [name for name, values in given.items() if not _readable(name, values.type)]:
        rows.leave(_numpy(given.pop(name).is_valid()))
    texts = {name: rows.text([given[one] for one in theirs if one in given]) for name, theirs in TEXTS.items()}
    rows.leave(~_numpy(pc.equal(given.get("op", texts["op"]), "upsert"), null=True))
    rows.leave(_numpy(pc.equal(pc.binary_length(texts["prompt"]), 0), null=True))
    rows.leave(_numpy(pc.equal(pc.binary_length(texts["target"]), 0), null=True))
    for name, most in (("prompt", limits.max_prompt_chars), ("target", limits.max_target_chars)):
        rows.leave(_longer(texts[name], most))
    absent = {name: pc.equal(pc.binary_length(texts[name]), 0) for name in ("subject", "ground_truth", "author")}
    texts |= {name: pc.if_else(absent[name], pa.scalar(None, pa.string()), texts[name]) for name in absent}
    rows.leave(_longer(texts["subject"], limits.max_prompt_chars))

    longest = limits.max_prompt_chars
    lists = {
        "paraphrases": rows.listed({name: given[name] for name in PARAPHRASES if name in given}, longest),
        "locality": rows.listed({name: given[name] for name in LOCALITY if name in given}, longest, LOCALITY),
        "out_of_scope": rows.listed({name: given[name] for name in OUT_OF_SCOPE if name in given}, longest),
    }
    prompt, target, subject = (pc.fill_null(texts[name], "") for name in ("prompt", "target", "subject"))
    slot_prompt = folded(prompt)
    rows.leave(_numpy(pc.equal(folded(target), slot_prompt)))

    plain = ~rows.left
    table = pa.table({**texts, **lists, "slot_prompt": slot_prompt, "slot_subject": folded(subject), "row": numbers})
    if not plain.all():
        table = table.filter(pa.array(plain))
    table = table.combine_chunks()
    made = {name: _unchunked(table[name]) for name in table.column_names if not name.startswith("slot_")}
    made["op"] = pa.repeat("upsert", table.num_rows)
    made["edit_id"] = _ids(_edit_json(made))
    made["slot_id"] = _ids(_slot_json(_unchunked(table["slot_subject"]), _unchunked(table["slot_prompt"])))
    return plain, pa.Table.from_arrays(
        [made[name].cast(CHECKED.field(name).type) for name in CHECKED.names], schema=CHECKED
    )


class _Rows:
    """The rows of one table, and which of them are `left` to be read one by one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.left = np.zeros(count, bool)

    def leave(self, rows: Mask) -> None:
        self.left |= rows

    def text(self, columns: Sequence[pa.Array]) -> pa.Array:
        """The first that is there, stripped."""
        if not columns:
            return pa.nulls(self.count, pa.string())
        texts = columns[0] if len(columns) == 1 else pc.coalesce(*columns)
        self.leave(unclean(texts))
        return pc.ascii_trim(texts, " ")

    def listed(self, columns: dict[str, pa.Array], longest: int, kinds: dict[str, str] | None = None) -> pa.Array:
        """Lists of all texts of the columns, row by row in the order of the columns."""
        parts = [self._values(values, None if kinds is None else kinds[name]) for name, values in columns.items()]
        for part in parts:
            bad = unclean(part.texts) | _blank(part.texts) | _longer(part.texts, longest)
            if part.kinds is not None:
                bad |= ~_numpy(pc.is_in(part.kinds, pa.array(get_args(LocalityKind))))
            self.left[part.rows[bad]] = True
        rows = np.concatenate([np.empty(0, np.int64), *(part.rows for part in parts)])
        texts = pa.concat_arrays([pa.array([], pa.string()), *(part.texts for part in parts)])
        offsets = np.zeros(self.count + 1, np.int32)
        np.cumsum(np.bincount(rows, minlength=self.count), out=offsets[1:])
        order = pa.array(np.argsort(rows, kind="stable")) if len(parts) > 1 else None
        values = texts if order is None else texts.take(order)
        if kinds is not None:
            all_kinds = pa.concat_arrays([pa.array([], pa.string()), *(part.kinds for part in parts)])
            values = pa.StructArray.from_arrays(
                [values, all_kinds if order is None else all_kinds.take(order)], ["prompt", "kind"]
            )
        return pa.ListArray.from_arrays(pa.array(offsets), values)

    def _values(self, values: pa.Array, kind: str | None) -> _Listed:
        if pa.types.is_string(values.type):  # a blank one is as good as none
            rows = np.flatnonzero(_numpy(values.is_valid()) & ~_blank(values))
            texts = values.take(pa.array(rows)) if len(rows) < len(values) else values
            return _Listed(rows, texts, None if kind is None else pa.repeat(kind, len(rows)))
        rows = pc.list_parent_indices(values).to_numpy().astype(np.int64)
        items = pc.list_flatten(values)
        if pa.types.is_struct(items.type):
            self.left[rows[_numpy(items.is_null())]] = True
            return _Listed(rows, items.field("prompt"), items.field("kind"))
        return _Listed(rows, items, None if kind is None else pa.repeat(kind, len(rows)))


def _readable(name: str, kind: pa.DataType) -> bool:
    if pa.types.is_string(kind) and name != ROME:
        return True
    if not pa.types.is_list(kind) or name not in LISTS:
        return False
    items = kind.value_type
    if pa.types.is_struct(items) and name in LOCALITY:
        names = {field.name: field.type for field in items}
        return (
            items.num_fields == 2 and set(names) == {"prompt", "kind"} and all(map(pa.types.is_string, names.values()))
        )
    return bool(pa.types.is_string(items))


def _edit_json(made: dict[str, pa.Array]) -> pa.Array:
    """What `Edit.edit_id` hashes: JSON with sorted keys, without `out_of_scope` where there is none."""
    kinds, prompts = (made["locality"].values.field(name) for name in ("kind", "prompt"))
    scope = _items(made["out_of_scope"], *_quoted(made["out_of_scope"].values))
    if len(made["out_of_scope"].values):
        listed = _joined(*scope)
        scope = [pc.if_else(pc.equal(pc.binary_length(listed), 0), "", _joined('"out_of_scope": [', listed, "], "))]
    return _joined(
        '{"ground_truth": ',
        *_quoted(made["ground_truth"]),
        ', "locality": [',
        *_items(made["locality"], '{"kind": "', kinds, '", "prompt": ', *_quoted(prompts), "}"),
        '], "op": "upsert", ',
        *scope,
        '"paraphrases": [',
        *_items(made["paraphrases"], *_quoted(made["paraphrases"].values)),
        '], "prompt": ',
        *_quoted(made["prompt"]),
        ', "subject": ',
        *_quoted(made["subject"]),
        ', "target": ',
        *_quoted(made["target"]),
        "}",
    )


def _slot_json(subject: pa.Array, prompt: pa.Array) -> pa.Array:
    return _joined("[", *_quoted(subject), ", ", *_quoted(prompt), "]")


def _quoted(texts: pa.Array) -> list[pa.Array | str]:
    """JSON of texts without control characters, in pieces to be joined; null where there is none."""
    if texts.null_count == len(texts) and len(texts):
        return ["null"]
    for sign in ("\\", '"'):
        if (characters(texts) == ord(sign)).any():
            texts = pc.replace_substring(texts, sign, "\\" + sign)
    return [pc.coalesce(_joined('"', texts, '"'), "null")] if texts.null_count else ['"', texts, '"']


def _items(lists: pa.ListArray, *pieces: pa.Array | str) -> list[pa.Array | str]:
    """The lists with commas, in pieces; `pieces` put together are their items."""
    offsets = lists.offsets.to_numpy()
    if offsets[-1] == offsets[0]:
        return []
    if (np.diff(offsets) == 1).all():  # one item each, as most have
        return list(pieces)
    return [pc.binary_join(pa.ListArray.from_arrays(lists.offsets, _joined(*pieces)), ", ")]


def _joined(*parts: pa.Array | str) -> pa.Array:
    whole: list[pa.Array | str] = []
    for part in parts:  # constants that stand side by side are one
        if isinstance(part, str) and whole and isinstance(whole[-1], str):
            whole[-1] += part
        else:
            whole.append(part)
    return pc.binary_join_element_wise(*whole, "")


def _ids(texts: pa.Array) -> pa.Array:
    """128 bits of BLAKE2b of each text, in hex."""
    nothing = blake2b(digest_size=ID_BYTES)
    digests = []
    for text in texts.cast(pa.binary()).to_pylist():
        hashed = nothing.copy()  # cheaper than a new one
        hashed.update(text)
        digests.append(hashed.digest())
    chars = _HEX[np.frombuffer(b"".join(digests), np.uint8)]
    offsets = np.arange(len(digests) + 1, dtype=np.int32) * (2 * ID_BYTES)
    return pa.Array.from_buffers(pa.string(), len(digests), [None, pa.py_buffer(offsets), pa.py_buffer(chars)])


def _unchunked(column: pa.ChunkedArray) -> pa.Array:
    """One array with offsets of 32 bits and without dictionaries."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if pa.types.is_large_string(array.type):
        array = array.cast(pa.string())
    if pa.types.is_large_list(array.type) and pa.types.is_large_string(array.type.value_type):
        array = array.cast(pa.list_(pa.string()))
    elif pa.types.is_large_list(array.type):
        array = array.cast(pa.list_(array.type.value_type))
    return array


def _longer(texts: pa.Array, most: int) -> Mask:
    """Longer than `most` bytes, and so perhaps than `most` characters."""
    return _numpy(pc.greater(pc.binary_length(texts), most))


def _blank(texts: pa.Array) -> Mask:
    return _numpy(pc.equal(pc.binary_length(pc.ascii_trim(texts, " ")), 0), null=True)


def _numpy(mask: pa.Array, *, null: bool = False) -> Mask:
    found: Mask = pc.fill_null(mask, null).to_numpy(zero_copy_only=False)
    return found
