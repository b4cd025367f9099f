"""The edit log as a dictionary: the rules of `pipeline.storage.batches`, row by row. What the real log is held to."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.edits import Edit
from pipeline.storage.batches import Batch, Counts

RETRACT_SOURCE = "wiseline retract"
Content = str | None  # the edit's id; None: empty


def content(edit: Edit) -> Content:
    return edit.edit_id if edit.op == "upsert" else None


def read_rows(rows: Iterable[tuple[Edit, bool]], slots: Mapping[str, Content]) -> tuple[list[int], Counts]:
    """Places of the new rows among (edit, silent), and what each row was; `slots`: what the log holds."""
    held, said = dict(slots), dict[str, Content]()
    new: list[int] = []
    counts = Counts()
    for place, (edit, silent) in enumerate(rows):
        slot, says = edit.slot_id, content(edit)
        if silent:
            counts += Counts(unchanged=1)
        elif slot in said and said[slot] == says:
            counts += Counts(duplicates=1)
        elif held.get(slot) == says:
            counts += Counts(unchanged=1)
        else:
            new.append(place)
            filled = held.get(slot) is not None
            counts += Counts(ingested=1, superseded=says is not None and filled, retracted=says is None)
        if not silent:
            held[slot] = said[slot] = says
    return new, counts


@dataclass
class Model:
    entries: list[tuple[str, int, Edit]] = field(default_factory=list)
    batch_ids: set[str] = field(default_factory=set)

    def slots(self) -> dict[str, Content]:
        return {edit.slot_id: content(edit) for _, _, edit in self.entries}

    def ingest(self, batches: Sequence[Batch], *, again: bool = False) -> Counts:
        heard = {(source, row): edit.edit_id for source, row, edit in self.entries}
        rows: list[tuple[str, int, Edit, bool]] = []
        counts, seen = Counts(), set[str]()
        for one in batches:
            counts += Counts(quarantined=len(one.rejections))
            if not again and one.batch_id in seen:
                counts += Counts(duplicates=len(one.edits))
                continue
            seen.add(one.batch_id)
            known = one.batch_id in self.batch_ids
            for row, edit in one.edits:
                silent = not again and (known or heard.get((one.source, row)) == edit.edit_id)
                rows.append((one.source, row, edit, silent))
        new, read = read_rows([(edit, silent) for *_, edit, silent in rows], self.slots())
        self.entries += [rows[place][:3] for place in new]
        self.batch_ids |= seen
        return counts + read

    def retract(self, edit: Edit) -> None:
        last = [number for number, (*_, one) in enumerate(self.entries) if one.slot_id == edit.slot_id]
        if last and (gone := self.entries[last[-1]][2]).op == "upsert":
            retraction = Edit(op="retract", prompt=gone.prompt, subject=gone.subject)
            self.entries.append((RETRACT_SOURCE, last[-1], retraction))
