import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.edits import Edit
from pipeline.storage.batches import edit_rows, plan_append
from pipeline.storage.slot_table import Ids, SlotTable, by_id, decide, ids_of
from tests.unit.storage.test_batches import EDITS, batch


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
    slots = {edit.slot_id: edit.edit_id if edit.op == "upsert" else None for edit in before}
    edits = [edit for edit, _ in rows]
    heard = {row: edit.edit_id for row, (edit, silent) in enumerate(rows, start=1) if silent}
    expected = plan_append(batch(*edits), slots, said={}, known=False, read_before=heard)
    decided = decide(
        *columns(edits),
        silent=np.array([silent for _, silent in rows], bool),
        log=SlotTable.newest(*columns(before)),
    )
    assert (np.flatnonzero(decided.new) + 1).tolist() == [row for row, _ in expected.rows]
    counts = expected.counts
    assert (decided.superseded, decided.retracted) == (counts.superseded, counts.retracted)
    assert int(decided.duplicate.sum()) == counts.duplicates


PAIRS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=12)


@given(PAIRS, PAIRS)
@settings(max_examples=300)
def test_ids_whose_first_halves_agree_are_kept_apart(
    pairs: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> None:
    contents = ids(*((1, number + 1) for number in range(len(pairs))))
    table = SlotTable.newest(ids(*pairs), contents)
    newest = {pair: (1, number + 1) for number, pair in enumerate(pairs)}
    assert table.held(ids(*wanted)).tolist() == [list(newest.get(pair, (0, 0))) for pair in wanted]
    ordered = [pairs[place] for place in by_id(ids(*pairs))]
    assert all(ordered.index(pair) + ordered.count(pair) > place for place, pair in enumerate(ordered))
    assert sorted(by_id(ids(*pairs)).tolist()) == list(range(len(pairs)))


def test_an_id_in_hex_is_read_whole() -> None:
    edits = [Edit(prompt=str(number), target="t") for number in range(3)]
    found = ids_of(edit_rows(enumerate(edits))["edit_id"].slice(1))
    assert [bytes(row.tobytes()).hex() for row in found] == [edit.edit_id for edit in edits[1:]]
