"""Which rows of a long stream are new: `batches.plan_append` for millions of rows at once, in NumPy.

An id is two uint64 (128 bits in all), so a row costs 16 bytes per id and no Python object. N rows, S slots.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import CorruptObject

Ids = npt.NDArray[np.uint64]  # N x 2
Mask = npt.NDArray[np.bool_]
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
        slots = slots[order]
        last = np.ones(len(slots), bool)
        last[:-1] = differ(slots[1:], slots[:-1])
        return cls(slots[last], contents[order[last]])

    def held(self, wanted: Ids) -> Ids:
        """What the slots `wanted` hold; zeros where nothing does."""
        found = np.zeros_like(wanted)
        if not len(self.slots):
            return found
        place = np.searchsorted(self.slots[:, 0], wanted[:, 0])
        open_rows = np.arange(len(wanted))
        while len(open_rows):  # once, but for ids whose first halves agree
            open_rows = open_rows[place[open_rows] < len(self.slots)]
            there = self.slots[place[open_rows]]
            open_rows, there = (part[there[:, 0] == wanted[open_rows, 0]] for part in (open_rows, there))
            hit = there[:, 1] == wanted[open_rows, 1]
            found[open_rows[hit]] = self.contents[place[open_rows[hit]]]
            open_rows = open_rows[~hit]
            place[open_rows] += 1
        return found


@dataclass(frozen=True)
class Decided:
    """What each row is: `new` rows are appended; `superseded` and `retracted` count among them."""

    new: Mask
    duplicate: Mask
    superseded: int
    retracted: int


def decide(slots: Ids, contents: Ids, *, silent: Mask, log: SlotTable) -> Decided:
    """Decide for all rows of a call at once, by the rules of `plan_append`.

    `contents`: the edit's id, zeros for a retraction; `silent`: rows the log has heard before; `log`: what it holds.

    A row that repeats the row before it of the same slot is a duplicate. Of the others those that may speak change what
    the slot holds, or find it already there: either way the slot holds their content afterwards. So such a row is new
    iff its content differs from that of the speaking row before it, or for the first one from what the log holds.
    """
    order = by_id(slots)
    slots, contents = slots[order], contents[order]
    starts = np.ones(len(order), bool)
    starts[1:] = differ(slots[1:], slots[:-1])
    repeats = ~starts
    repeats[1:] &= ~differ(contents[1:], contents[:-1])

    speaks = np.flatnonzero(~repeats & ~silent[order])
    slot_number = np.cumsum(starts)[speaks]
    first = np.ones(len(speaks), bool)
    first[1:] = slot_number[1:] != slot_number[:-1]
    said = contents[speaks]
    before = np.empty_like(said)
    before[1:] = said[:-1]
    before[first] = log.held(slots[speaks[first]])
    changes = differ(said, before)

    new, duplicate = np.zeros(len(order), bool), np.zeros(len(order), bool)
    new[order[speaks[changes]]] = True
    duplicate[order] = repeats
    fills, filled = (ids[:, 0] | ids[:, 1] != 0 for ids in (said, before))
    return Decided(new, duplicate, int((changes & fills & filled).sum()), int((changes & ~fills).sum()))


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


def by_id(ids: Ids) -> npt.NDArray[np.intp]:
    """The order that puts equal ids side by side and otherwise keeps the order of the rows."""
    order = np.argsort(ids[:, 0], kind="stable")
    first, second = ids[order, 0], ids[order, 1]
    if ((first[1:] == first[:-1]) & (second[1:] != second[:-1])).any():  # by chance once in 10^6 such streams
        return np.lexsort((ids[:, 1], ids[:, 0]))
    return order
