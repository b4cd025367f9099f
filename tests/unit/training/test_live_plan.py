"""What a live release keeps and takes in: for any log, the posted edits that live and nothing that was taken back."""

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from pipeline.edits import Edit
from pipeline.storage.bank import BankEntry
from pipeline.storage.edit_log import POSTED, LogEntry
from pipeline.training.live_plan import plan_live

NOW = datetime(2026, 1, 1, tzinfo=UTC)
Said = tuple[Edit, str]

upserts = st.tuples(st.integers(0, 8), st.integers(0, 2)).map(lambda t: Edit(prompt=f"q{t[0]}", target=f"a{t[1]}"))
retractions = st.integers(0, 8).map(lambda slot: Edit(op="retract", prompt=f"q{slot}"))
logs = st.lists(st.tuples(st.one_of(upserts, upserts, retractions), st.sampled_from([POSTED, "file"])), max_size=30)


def newest(log: list[Said]) -> dict[str, LogEntry]:
    slots: dict[str, LogEntry] = {}
    for seq, (edit, source) in enumerate(log):
        slots.pop(edit.slot_id, None)
        slots[edit.slot_id] = LogEntry(seq, edit, source, 0, "b", NOW)
    return slots


def bank_of(edits: list[Edit]) -> list[BankEntry]:
    return [BankEntry(edit.edit_id, edit.prompt, edit.target, edit.subject, 0) for edit in edits]


@given(logs, st.integers(0, 30), st.integers(1, 20))
def test_step_by_step_every_posted_edit_that_lives_comes_in_once_and_in_order(
    log: list[Said], cut: int, most: int
) -> None:
    """The bank of a release at any earlier time, then live steps until nothing is left."""
    held = [said.edit for said in newest(log[:cut]).values() if said.edit.op == "upsert"]
    slots = newest(log)
    steps = 0
    while True:
        plan = plan_live(slots, bank_of(held), most=most, fits=lambda edit: True)
        assert len(plan.new) <= most
        assert list(plan.kept) == sorted(set(plan.kept))
        if not plan.new and len(plan.kept) == len(held):
            break
        held = [held[place] for place in plan.kept] + list(plan.new)
        steps += 1
    assert steps <= len(log) + 1
    ids = [edit.edit_id for edit in held]
    assert len(ids) == len(set(ids))
    said = {edit.prompt: edit for edit in held}
    for prompt, entry in ((entry.edit.prompt, entry) for entry in slots.values()):
        if entry.edit.op == "retract":
            assert prompt not in said
        elif entry.source == POSTED:
            assert said[prompt].edit_id == entry.edit.edit_id
    before = {edit.edit_id for edit in (said.edit for said in newest(log[:cut]).values())}
    assert all(edit.edit_id in before or slots[edit.slot_id].source == POSTED for edit in held)


@given(logs)
def test_what_failed_is_not_tried_again_and_is_forgotten_with_its_edit(log: list[Said]) -> None:
    slots = newest(log)
    everything = [entry.edit.edit_id for entry in slots.values()]
    plan = plan_live(slots, [], failed=everything, most=9, fits=lambda edit: True)
    living = {e.edit.edit_id for e in slots.values() if e.source == POSTED and e.edit.op == "upsert"}
    assert (plan.new, set(plan.failed)) == ((), living)
    assert plan_live({}, [], failed=everything, most=9, fits=lambda edit: True).failed == ()


def test_what_the_context_cannot_hold_has_failed() -> None:
    slots = newest([(Edit(prompt="short", target="t"), POSTED), (Edit(prompt="long", target="t"), POSTED)])
    plan = plan_live(slots, [], most=9, fits=lambda edit: edit.prompt == "short")
    assert [edit.prompt for edit in plan.new] == ["short"]
    assert plan.failed == (Edit(prompt="long", target="t").edit_id,)


def test_a_file_supersedes_only_with_its_round() -> None:
    old, new = Edit(prompt="q", target="old"), Edit(prompt="q", target="new")
    assert plan_live(newest([(old, POSTED), (new, "file")]), bank_of([old]), most=9, fits=lambda e: True).kept == (0,)
    posted = plan_live(newest([(old, "file"), (new, POSTED)]), bank_of([old]), most=9, fits=lambda e: True)
    assert (posted.kept, posted.new) == ((), (new,))
