from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.edits import Edit
from pipeline.storage.batches import Batch, Counts, Plan, Rejection, plan_append

PROMPTS = st.sampled_from(["p", "q", "r"])
EDITS = st.one_of(
    st.builds(lambda prompt, target: Edit(prompt=prompt, target=target), PROMPTS, st.sampled_from(["1", "2", "3"])),
    st.builds(lambda prompt: Edit(op="retract", prompt=prompt), PROMPTS),
)


def batch(*edits: Edit, source: str = "file", after: str = "") -> Batch:
    return Batch(source, tuple(enumerate(edits, start=1)), (), after)


def up(prompt: str, target: str) -> Edit:
    return Edit(prompt=prompt, target=target)


def plan(one: Batch, slots: dict[str, str | None] | None = None, **given: object) -> Plan:
    arguments: dict[str, object] = {"said": {}, "known": False, "read_before": {}}
    return plan_append(one, slots or {}, **(arguments | given))  # type: ignore[arg-type]


@given(st.lists(EDITS, max_size=12), st.lists(EDITS, max_size=6))
@settings(max_examples=200)
def test_the_last_row_of_a_slot_wins_and_every_row_counts_once(before: list[Edit], edits: list[Edit]) -> None:
    expected: dict[str, str | None] = {}
    for edit in before:
        expected[edit.slot_id] = edit.edit_id if edit.op == "upsert" else None
    slots = dict(expected)
    for edit in edits:
        expected[edit.slot_id] = edit.edit_id if edit.op == "upsert" else None
    result = plan(batch(*edits), slots)
    assert slots | result.slots == {slot: expected[slot] for slot in slots | result.slots}
    assert all(slot in result.slots or content is None for slot, content in expected.items() if slot not in slots)
    assert result.counts.rows == len(edits)
    assert result.counts.ingested == len(result.rows)


@given(st.lists(EDITS, max_size=12))
@settings(max_examples=100)
def test_what_was_just_appended_says_nothing_new(edits: list[Edit]) -> None:
    first = plan(batch(*edits))
    for again in ({"known": True}, {"read_before": {row: edit.edit_id for row, edit in enumerate(edits, start=1)}}):
        assert plan(batch(*edits), first.slots, **again).counts.ingested == 0


def test_each_kind_of_row_is_told_apart() -> None:
    held = up("held", "old")
    counts = plan(
        batch(
            up("held", "old"),  # unchanged
            up("HELD ", "new"),  # superseded: the same slot, whatever its case and spacing
            up("held", "new"),  # ingested: another prompt spelling is other content
            up("fresh", "a"),
            up("fresh", "a"),  # duplicate
            up("fresh", "b"),  # superseded
            up("fresh", "a"),  # superseded again: not a repetition of the row before
            Edit(op="retract", prompt="fresh"),
            Edit(op="retract", prompt="fresh"),  # duplicate
            Edit(op="retract", prompt="never seen"),  # unchanged
        ),
        {held.slot_id: held.edit_id},
    ).counts
    assert counts == Counts(ingested=6, unchanged=2, duplicates=2, superseded=4, retracted=1)


def test_a_row_repeated_in_another_file_of_the_same_call_is_a_duplicate() -> None:
    first = plan(batch(up("p", "1")))
    second = plan(batch(up("p", "1"), source="copy"), first.slots, said=first.said)
    assert second.counts == Counts(duplicates=1)


def test_a_batch_is_its_content_wherever_it_stands() -> None:
    assert batch(up("p", "1")).batch_id == batch(up("p", "1"), source="elsewhere").batch_id
    different = [
        batch(up("p", "1")),
        batch(up("p", "2")),
        batch(up("p", "1"), up("p", "1")),
        batch(up("p", "1"), after="x"),
        Batch("file", ((1, up("p", "1")),), (Rejection(2, "broken", "{"),)),
    ]
    assert len({one.batch_id for one in different}) == len(different)
