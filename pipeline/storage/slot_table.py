"""Which rows of a long stream are new, for millions of rows at once, in NumPy.

The rules, row by row, are in `batches.py`. An id is two uint64 (128 bits in all), so a row costs 16 bytes per id and no
Python object. N rows, S slots.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import CorruptObject

Ids = npt.NDArray[np.uint64]  # N x 2
Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]
ID_CHARS = 32


@dataclass(frozen=True)
class SlotTable:
    """What each slot holds, sorted by slot: `contents` is the edit's id, zeros where the slot was retracted."""

    slots: Ids
    contents: Ids

    @classmethod
    def newest(cls, slots: Ids, contents: Ids) -> "SlotTable":
        """Of rows in their order, the last of each slot."""
        order = by_id(slots)
        slots = np.take(slots, order, axis=0)
        last = np.ones(len(slots), bool)
        last[:-1] = differ(slots[1:], slots[:-1])
        return cls(slots[last], contents[order[last]])

    def find(self, wanted: Ids) -> tuple[Numbers, Ids]:
        """Which of the slots `wanted` are in the table, and what these hold."""
        place = np.searchsorted(self.slots[:, 0], wanted[:, 0])
        open_rows = np.arange(len(wanted))
        rows, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while len(open_rows):  # once, but for ids whose first halves agree
            open_rows = open_rows[place[open_rows] < len(self.slots)]
            there = self.slots[place[open_rows]]
            open_rows, there = (part[there[:, 0] == wanted[open_rows, 0]] for part in (open_rows, there))
            hit = there[:, 1] == wanted[open_rows, 1]
            rows.append(open_rows[hit])
            places.append(place[open_rows[hit]])
            open_rows = open_rows[~hit]
            place[open_rows] += 1
        return np.concatenate(rows), self.contents[np.concatenate(places)]


@dataclass(frozen=True)
class Decided:
    """Which rows are `new`, and so appended; the others repeat a row of the call, or what the log holds."""

    new: Mask
    duplicates: int
    superseded: int
    retracted: int


def decide(order: Numbers, slots: Ids, edit_ids: Ids, *, retracts: Mask, silent: Mask, held: Ids) -> Decided:
    """Decide for all rows of a call at once.

    `order`: `by_id(slots)`; `silent`: rows the log has heard before, which change nothing; `held`: what the log holds
    in the row's slot, zeros for nothing.

    After a row that speaks its slot holds what it said, whether it was new or not. So such a row is new iff it differs
    from the speaking row before it in its slot, or for the first one from what the log holds.
    """
    speaks = order[~silent[order]]
    there = np.take(slots, speaks, axis=0)  # much faster than slots[speaks]
    first = np.ones(len(speaks), bool)
    first[1:] = differ(there[1:], there[:-1])
    del there
    said, before = np.take(edit_ids, speaks, axis=0), np.take(held, speaks, axis=0)
    said[retracts[speaks]] = 0
    follows = np.flatnonzero(~first)
    before[follows] = said[follows - 1]
    changes = differ(said, before)
    fills, filled = (ids[:, 0] | ids[:, 1] != 0 for ids in (said, before))
    new = np.zeros(len(order), bool)
    new[speaks[changes]] = True
    return Decided(
        new,
        duplicates=int((~first & ~changes).sum()),
        superseded=int((changes & fills & filled).sum()),
        retracted=int((changes & ~fills).sum()),
    )


def ids_of(column: Any) -> Ids:
    """Ids in hex, an Arrow array of N strings, as N x 2 numbers. Raises CorruptObject for what is no id."""
    if isinstance(column, pa.ChunkedArray):
        return np.concatenate([np.empty((0, 2), np.uint64), *(ids_of(chunk) for chunk in column.chunks)])
    if len(column) == 0:
        return np.empty((0, 2), np.uint64)
    offsets = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1, column.offset * 4)
    if column.null_count or (np.diff(offsets) != ID_CHARS).any():
        raise CorruptObject("The edit log holds an id that is not 32 characters long; restore the log from a copy.")
    text = column.buffers()[2].slice(int(offsets[0]), len(column) * ID_CHARS).to_pybytes()
    try:
        return np.frombuffer(bytes.fromhex(text.decode("ascii")), np.uint64).reshape(len(column), 2)
    except ValueError:
        raise CorruptObject("The edit log holds an id that is not in hex; restore the log from a copy.") from None


def differ(some: Ids, others: Ids) -> Mask:
    # Much faster than any(axis=1).
    different: Mask = (some[:, 0] != others[:, 0]) | (some[:, 1] != others[:, 1])
    return different


def by_id(ids: Ids) -> Numbers:
    """The order that puts equal ids side by side and otherwise keeps the order of the rows."""
    order = np.argsort(ids[:, 0], kind="stable")
    first, second = ids[order, 0], ids[order, 1]
    if ((first[1:] == first[:-1]) & (second[1:] != second[:-1])).any():  # by chance once in 10^6 such streams
        return np.lexsort((ids[:, 1], ids[:, 0]))
    return order
