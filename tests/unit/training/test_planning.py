"""The plan is a pure function of the log: replaying it must lose no edit, keep none that is gone, and change little."""

from collections.abc import Sequence
from datetime import UTC, datetime

from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.config import Config, load_config
from pipeline.edits import Edit
from pipeline.storage.edit_log import LogEntry
from pipeline.training.planning import Plan, plan_round

CONFIG = load_config(overrides=["shards.edits_per_shard=2", "shards.shards_per_memory=3", "shards.density=0.3"])
CAPACITY = 6

upserts = st.tuples(st.integers(0, 20), st.integers(0, 3)).map(
    lambda t: Edit(prompt=f"question {t[0]}", target=f"answer {t[1]}")
)
retractions = st.integers(0, 20).map(lambda slot: Edit(op="retract", prompt=f"question {slot}"))
logs = st.lists(st.one_of(upserts, upserts, upserts, retractions), max_size=60)
UNTIL_FULL = [Edit(prompt=f"question {index}", target="a") for index in range(CAPACITY)]


def plan(edits: Sequence[Edit], *, config: Config = CONFIG, encoder: str = "", too_long: str = "never") -> Plan:
    history = [
        LogEntry(
            seq=index, edit=edit, source="test", row=index, batch_id="b", ingested_at=datetime(2026, 1, 1, tzinfo=UTC)
        )
        for index, edit in enumerate(edits)
    ]
    return plan_round(
        history,
        log_version=len(edits),
        config=config,
        fingerprint="f",
        layer=1,
        encoder=encoder,
        fits=lambda e: too_long not in e.prompt,
    )


@given(logs)
def test_living_edits_are_the_newest_of_each_slot_and_each_has_one_place(edits: list[Edit]) -> None:
    newest: dict[str, Edit] = {}
    for edit in edits:
        newest[edit.prompt] = edit
    wanted = sorted(edit.edit_id for edit in newest.values() if edit.op == "upsert")
    assert sorted(edit.edit_id for edit in plan(edits).live_edits) == wanted


@given(logs)
def test_no_shard_is_overfull_and_none_is_empty(edits: list[Edit]) -> None:
    for memory in plan(edits).memories:
        assert 1 <= len(memory.edits) <= CAPACITY
        assert all(1 <= len(shard.edits) <= 2 for shard in memory.shards)
        assert memory.live <= {edit.edit_id for edit in memory.edits}


@given(logs, upserts)
def test_one_more_edit_changes_at_most_the_memory_it_left_and_the_newest(edits: list[Edit], more: Edit) -> None:
    """What is trained again follows what changed; a dissolved memory's edits may fill one more."""
    before = {memory.digest for memory in plan(edits).memories}
    after = [memory.digest for memory in plan([*edits, more]).memories]
    assert len([digest for digest in after if digest not in before]) <= 2


@given(logs, logs)
def test_what_a_round_must_train_is_what_changed(edits: list[Edit], more: list[Edit]) -> None:
    """Only new edits, those of a memory that was not full yet and those of a memory that was dissolved are trained.
    Every other memory keeps its shards, whatever was superseded or retracted in it meanwhile."""
    before, after = plan(edits), plan([*edits, *more])
    kept = {memory.digest: memory for memory in after.memories}
    gone = [memory for memory in before.memories if memory.digest not in kept]
    for memory in before.memories:
        if memory.digest in kept:
            assert kept[memory.digest].shards == memory.shards
    may_train = {edit.edit_id for edit in more} | {edit.edit_id for memory in gone for edit in memory.edits}
    old = {memory.digest for memory in before.memories}
    trained = [edit.edit_id for memory in after.memories if memory.digest not in old for edit in memory.edits]
    assert set(trained) <= may_train
    touched = {edit.slot_id for edit in more}
    for memory in gone:
        living = [edit for edit in memory.edits if edit.edit_id in memory.live and edit.slot_id not in touched]
        was_full = len(memory.edits) == CAPACITY
        assert not was_full or len(living) < 0.5 * CAPACITY, "a full memory that mostly lives is left alone"


@given(logs, logs)
@example(UNTIL_FULL, UNTIL_FULL[:3])  # half of it is just enough
def test_a_full_memory_that_mostly_lives_loses_exactly_the_edits_whose_slot_was_named_again(
    edits: list[Edit], more: list[Edit]
) -> None:
    before, after = plan(edits), plan([*edits, *more])
    touched = {edit.slot_id for edit in more}
    kept = {memory.digest: memory for memory in after.memories}
    for memory in before.memories:
        untouched = {edit.edit_id for edit in memory.edits if edit.slot_id not in touched}
        living = memory.live & untouched
        if len(memory.edits) == CAPACITY and len(living) >= 0.5 * CAPACITY:
            assert kept[memory.digest].live == living


def test_edits_of_a_dissolved_memory_may_fill_the_same_memory_anew() -> None:
    first, second = plan(UNTIL_FULL), plan([*UNTIL_FULL, *UNTIL_FULL[:4]])
    assert second.memories == first.memories, "nothing is to be trained twice for what was said twice"


@given(logs)
def test_what_says_nothing_new_changes_no_memory(edits: list[Edit]) -> None:
    """Slots that were never filled are retracted: the log moves on, the round stays the same."""
    nothing = [Edit(op="retract", prompt=f"never asked {n}") for n in range(3)]
    assert plan([*edits, *nothing]).round_id == plan(edits).round_id


@given(logs)
def test_equal_logs_give_equal_plans(edits: list[Edit]) -> None:
    assert plan(edits) == plan(list(edits))


def test_superseding_an_edit_of_a_sealed_memory_leaves_its_shards_alone() -> None:
    full = [Edit(prompt=f"question {index}", target="a") for index in range(CAPACITY)]
    first, second = plan(full), plan([*full, Edit(prompt="question 0", target="b")])
    assert second.memories[0].digest == first.memories[0].digest
    assert full[0].edit_id in first.memories[0].live
    assert full[0].edit_id not in second.memories[0].live
    assert [edit.target for edit in second.memories[1].edits] == ["b"]


def test_a_mostly_dead_memory_is_dissolved() -> None:
    full = [Edit(prompt=f"question {index}", target="a") for index in range(CAPACITY)]
    gone = [Edit(op="retract", prompt=f"question {index}") for index in range(4)]
    (memory,) = plan([*full, *gone]).memories
    assert [edit.prompt for edit in memory.edits] == ["question 4", "question 5"]


def test_an_edit_too_long_for_the_context_is_left_out_and_still_supersedes() -> None:
    edits = [Edit(prompt="question 1 long", target="old"), Edit(prompt="question 2", target="x")]
    short = plan(edits, too_long="long")
    assert [edit.prompt for edit in short.live_edits] == ["question 2"]
    assert short.too_long == ("question 1 long",)
    gone = [*edits, Edit(op="retract", prompt="question 1 long")]
    assert plan(gone, too_long="long").too_long == ()


def test_what_cannot_change_results_does_not_change_the_round() -> None:
    edits = [Edit(prompt="question", target="a")]
    other = CONFIG.model_copy(update={"resources": CONFIG.resources.model_copy(update={"cpus_per_trainer": 2.0})})
    assert plan(edits, config=other) == plan(edits)
    method = CONFIG.model_copy(update={"merge": CONFIG.merge.model_copy(update={"method": "ties"})})
    assert plan(edits, config=method).round_id != plan(edits).round_id


def test_another_encoder_is_another_round_of_the_same_memories() -> None:
    edits = [Edit(prompt=f"question {n}", target="a") for n in range(3)]
    with_one, with_another = plan(edits, encoder="one"), plan(edits, encoder="another")
    assert with_one.round_id != with_another.round_id
    assert [memory.digest for memory in with_one.memories] == [memory.digest for memory in with_another.memories]
