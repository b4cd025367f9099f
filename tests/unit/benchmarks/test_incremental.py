"""The one percent of changes is what the benchmark says it is."""

from benchmarks.incremental import changed
from pipeline.actors.field_names import canonical_fields
from pipeline.edits import parse_edit

ROWS = [
    {
        "prompt": f"The mother tongue of person {n} is",
        "subject": f"person {n}",
        "target_new": f"language {n % 7}",
        "locality_prompt": f"Neighbour {n} is a native speaker of",
    }
    for n in range(2000)
]


def test_half_is_new_three_tenths_supersede_and_one_fifth_retracts() -> None:
    there = {edit.slot_id: edit for edit in map(parsed, ROWS)}
    changes = [parsed(row) for row in changed(ROWS)]
    assert len({edit.slot_id for edit in changes}) == len(changes) == 20
    new = [edit for edit in changes if edit.slot_id not in there]
    retracted = [edit for edit in changes if edit.op == "retract"]
    superseding = [edit for edit in changes if edit.op == "upsert" and edit.slot_id in there]
    assert (len(new), len(superseding), len(retracted)) == (10, 6, 4)
    assert all(edit.slot_id in there for edit in retracted)
    assert all(edit.target != there[edit.slot_id].target for edit in superseding)
    assert changed(ROWS) == changed(ROWS)


def parsed(row):  # type: ignore[no-untyped-def]
    return parse_edit(canonical_fields(row), max_prompt_chars=1000, max_target_chars=1000)
