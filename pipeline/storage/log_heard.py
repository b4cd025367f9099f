"""What the log says about the rows of a stream: what their slots hold, and whether it has heard the rows before.

It is taken in entry by entry as the log grows, so that a commit that lost its turn reads what is new and no more.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.storage.slot_table import Ids, Mask, Numbers, SlotTable, differ, ids_of

# Columns of `edits/` that are read.
ENTRY = ("seq", "slot_id", "edit_id", "op", "source", "row")
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)  # odd, so that no two rows of a source collide


class Heard:
    """For N rows of a stream: `held`, what the log holds in their slots; `silent`, rows that are the last thing the log
    heard from this row of this source; and `next_seq`, the number of the log's next entry."""

    def __init__(self, slots: Ids, edit_ids: Ids, *, sources: Sequence[str], source: Numbers, row: Numbers) -> None:
        """`source`: index into `sources`; `row`: the row's number there."""
        self._slots, self._edit_ids, self._sources = slots, edit_ids, pa.array(sources, pa.string())
        self._source, self._row = source, row
        self.held: Ids = np.zeros_like(slots)
        self.silent: Mask = np.zeros(len(slots), bool)
        self.next_seq = 0

    def take_in(self, entries: Iterable[pa.RecordBatch]) -> None:
        """Entries of the log from `next_seq` on, in any order."""
        seqs, slots, edit_ids, filled, places, spoke = (list[np.ndarray]() for _ in range(6))
        for part in entries:
            found = pc.index_in(part["source"], value_set=self._sources)
            ours = found.is_valid().to_numpy(zero_copy_only=False)
            seqs.append(part["seq"].to_numpy())
            slots.append(ids_of(part["slot_id"]))
            edit_ids.append(ids_of(part["edit_id"]))
            filled.append(pc.equal(part["op"], "upsert").to_numpy(zero_copy_only=False))
            places.append(_place(part["row"].to_numpy()[ours], found.drop_null().to_numpy().astype(np.int64)))
            spoke.append(ours)
        if not seqs:
            return
        seq, said, spoken = np.concatenate(seqs), np.concatenate(edit_ids), np.concatenate(spoke)
        order = np.argsort(seq, kind="stable")
        contents = np.where(np.concatenate(filled)[:, None], said, np.uint64(0))
        found, held = SlotTable.newest(np.concatenate(slots)[order], contents[order]).find(self._slots)
        self.held[found] = held
        if spoken.any():
            order = np.argsort(seq[spoken], kind="stable")
            last = SlotTable.newest(np.concatenate(places)[order], said[spoken][order])
            found, said = last.find(_place(self._row, self._source))
            self.silent[found] = ~differ(said, self._edit_ids[found])
        self.next_seq = max(self.next_seq, int(seq.max()) + 1)


def _place(row: Numbers, source: Numbers) -> Ids:
    """Row of a source in the shape of an id, to be looked up like one."""
    mixed = row.astype(np.uint64) * _MIX[0] ^ source.astype(np.uint64) * _MIX[1]
    return np.stack([mixed, source.astype(np.uint64)], axis=1)
