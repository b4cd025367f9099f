import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.edits import Edit
from pipeline.storage.batches import edit_rows
from pipeline.storage.slot_table import Ids, SlotTable, by_id, decide, ids_of
from tests.unit.storage.rules import content, read_rows
from tests.unit.storage.test_batches import EDITS


def ids(*numbers: tuple[int, int]) -> Ids:
    return np.array(numbers, np.uint64).reshape(-1, 2)


def columns(edits: list[Edit]) -> tuple[Ids, Ids]:
    rows = edit_rows(enumerate(edits))
    retracts = np.array([edit.op == "retract" for edit in edits], bool)
    return ids_of(rows["slot_id"]), np.where(retracts[:, None], np.uint64(0), ids_of(rows["edit_id"]))


FLAGGED = st.lists(st.tuples(EDITS, st.booleans()), max_size=14)


@given(st.lists(EDITS, max_size=6), FLAGGED)
@settings(max_examples=400)
def test_a_stream_is_decided_as_row_by_row(before: list[Edit], rows: list[tuple[Edit, bool]]) -> None:
    new, counts = read_rows(rows, {edit.slot_id: content(edit) for edit in before})
    table = edit_rows((0, edit) for edit, _ in rows)
    slots, edit_ids = ids_of(table["slot_id"]), ids_of(table["edit_id"])
    retracts = np.array([edit.op == "retract" for edit, _ in rows], bool)
    held = np.zeros_like(slots)
    found, there = SlotTable.newest(*columns(before)).find(slots)
    held[found] = there
    silent = np.array([silent for _, silent in rows], bool)
    decided = decide(by_id(slots), slots, edit_ids, retracts=retracts, silent=silent, held=held)
    assert np.flatnonzero(decided.new).tolist() == new
    assert (decided.superseded, decided.retracted) == (counts.superseded, counts.retracted)
    assert decided.duplicates == counts.duplicates


PAIRS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=12)


@given(PAIRS, PAIRS)
@settings(max_examples=300)
def test_ids_whose_first_halves_agree_are_kept_apart(
    pairs: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> None:
    contents = ids(*((1, number + 1) for number in range(len(pairs))))
    found, held = SlotTable.newest(ids(*pairs), contents).find(ids(*wanted))
    newest = {pair: [1, number + 1] for number, pair in enumerate(pairs)}
    assert dict(zip(found.tolist(), held.tolist(), strict=True)) == {
        place: newest[pair] for place, pair in enumerate(wanted) if pair in newest
    }
    ordered = [pairs[place] for place in by_id(ids(*pairs))]
    assert all(ordered.index(pair) + ordered.count(pair) > place for place, pair in enumerate(ordered))
    assert sorted(by_id(ids(*pairs)).tolist()) == list(range(len(pairs)))


def test_an_id_in_hex_is_read_whole() -> None:
    edits = [Edit(prompt=str(number), target="t") for number in range(3)]
    found = ids_of(edit_rows(enumerate(edits))["edit_id"].slice(1))
    assert [bytes(row.tobytes()).hex() for row in found] == [edit.edit_id for edit in edits[1:]]
