from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.edits import Edit
from pipeline.storage.batches import Batch, Counts, Rejection
from tests.unit.storage.rules import Model

PROMPTS = st.sampled_from(["p", "q", "r"])
EDITS = st.one_of(
    st.builds(lambda prompt, target: Edit(prompt=prompt, target=target), PROMPTS, st.sampled_from(["1", "2", "3"])),
    st.builds(lambda prompt: Edit(op="retract", prompt=prompt), PROMPTS),
)


def batch(*edits: Edit, source: str = "file", after: str = "") -> Batch:
    return Batch(source, tuple(enumerate(edits, start=1)), (), after)


def up(prompt: str, target: str) -> Edit:
    return Edit(prompt=prompt, target=target)


@given(st.lists(EDITS, max_size=12), st.lists(EDITS, max_size=6))
@settings(max_examples=200)
def test_by_the_rules_the_last_row_of_a_slot_wins_and_every_row_counts_once(
    before: list[Edit], edits: list[Edit]
) -> None:
    model = Model()
    model.ingest([batch(*before, source="before")])
    expected = model.slots() | {edit.slot_id: edit.edit_id if edit.op == "upsert" else None for edit in edits}
    count = len(model.entries)
    counts = model.ingest([batch(*edits, after="others")])
    found = model.slots()
    assert all(found.get(slot) == content for slot, content in expected.items())
    assert counts.rows == len(edits)
    assert counts.ingested == len(model.entries) - count


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


def test_counts_add_up() -> None:
    assert Counts(ingested=1, quarantined=2) + Counts(ingested=3, duplicates=1) == Counts(4, 0, 1, 2)
