import threading
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.edits import Edit, LocalityPrompt
from pipeline.errors import NotFound, StoreError
from pipeline.storage import delta_table, edit_log, log_append, staged_files
from pipeline.storage.batches import Batch, Counts, Rejection
from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import ObjectStore
from tests.unit.storage.test_batches import EDITS, batch, up


@pytest.fixture
def log(tmp_path: Path) -> EditLog:
    return EditLog(ObjectStore(str(tmp_path)))


def state(log: EditLog) -> tuple[object, ...]:
    return log.version(), log.history(), log.live(), log.quarantine()


def test_an_edit_comes_back_with_everything_it_said(log: EditLog) -> None:
    edit = Edit(
        prompt="Who leads Örland?\nNow",
        target="Anna 🦊",
        subject="Örland",
        ground_truth="Bo",
        paraphrases=("Örland's leader?", "Örland:"),
        locality=(LocalityPrompt(prompt="Who leads Erland?", kind="same_relation"), LocalityPrompt(prompt="2+2=")),
        author="me",
    )
    log.append(Batch("folder/file.jsonl", ((7, edit),)))
    (entry,) = log.history()
    assert entry.edit == edit
    assert (entry.edit.edit_id, entry.edit.slot_id) == (edit.edit_id, edit.slot_id)
    assert (entry.seq, entry.source, entry.row) == (0, "folder/file.jsonl", 7)
    assert log.slots() == {edit.slot_id: (edit.edit_id, "upsert")}


@given(st.data(), st.lists(st.lists(EDITS, min_size=1, max_size=4), min_size=1, max_size=4))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_reading_old_files_again_in_any_order_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, files: list[list[Edit]]
) -> None:
    log = EditLog(ObjectStore(str(tmp_path_factory.mktemp("store"))))
    batches = [batch(*edits, source=f"file {index}") for index, edits in enumerate(files)]
    for one in batches:
        log.append(one)
    before = state(log)
    for one in data.draw(st.lists(st.sampled_from(batches), max_size=5)):
        moved = Batch("moved elsewhere", one.edits)
        assert log.append(data.draw(st.sampled_from([one, moved]))).ingested == 0
    assert state(log) == before


def test_a_file_that_grew_adds_its_new_rows_only(log: EditLog) -> None:
    rows = [up("p", "monday"), up("p", "tuesday")]
    log.append(batch(*rows))
    counts = log.append(batch(*rows, up("q", "wednesday")))
    assert counts == Counts(ingested=1, unchanged=2)
    assert [entry.edit.target for entry in log.live()] == ["tuesday", "wednesday"]


def test_an_answer_can_return_in_another_file(log: EditLog) -> None:
    for index, target in enumerate(["x", "y", "x"]):
        log.append(batch(up("p", target), up("other", str(index)), source=f"day {index}"))
    assert {entry.edit.prompt: entry.edit.target for entry in log.live()} == {"p": "x", "other": "2"}


def test_a_retracted_edit_stays_away_when_its_file_is_read_again(log: EditLog) -> None:
    one = batch(up("p", "1"), up("q", "2"))
    log.append(one)
    (gone,) = log.retract([up("p", "1").slot_id], author="me")
    assert gone.edit.target == "1"
    log.append(one)
    assert [entry.edit.prompt for entry in log.live()] == ["q"]
    assert [entry.edit.op for entry in log.history()] == ["upsert", "upsert", "retract"]


def test_a_slot_can_be_retracted_filled_and_retracted_again(log: EditLog) -> None:
    for target in ("1", "2"):
        log.append(batch(up("p", target)))
        assert [entry.edit.target for entry in log.retract([up("p", target).slot_id])] == [target]
        assert log.live() == []
    assert log.retract([up("p", "1").slot_id]) == []


def test_a_refused_row_is_kept_once_though_its_file_grows(log: EditLog) -> None:
    bad = Rejection(2, "broken JSON", "{")
    log.append(Batch("f", ((1, up("p", "1")),), (bad,)))
    log.append(Batch("f", ((1, up("p", "1")), (3, up("q", "1"))), (bad,)))
    assert log.quarantine() == [("f", bad)]


def test_a_version_is_what_was_there_then(log: EditLog) -> None:
    log.append(batch(up("p", "1")))
    version = log.version()
    log.append(batch(up("p", "2")))
    assert [entry.edit.target for entry in log.live(version)] == ["1"]
    with pytest.raises(NotFound, match="versions 0 to 2"):
        log.live(99)


def test_equal_files_in_equal_order_give_equal_logs(tmp_path: Path) -> None:
    logs = [EditLog(ObjectStore(str(tmp_path / name))) for name in "ab"]
    for log in logs:
        for target in ("1", "2", "1"):
            log.append(batch(up("p", target)))
    first, second = ([(entry.seq, entry.edit, entry.batch_id) for entry in log.history()] for log in logs)
    assert first == second
    assert logs[0].version() == logs[1].version()


def test_a_log_that_another_process_wrote_to_is_read_again(tmp_path: Path) -> None:
    mine, theirs = (EditLog(ObjectStore(str(tmp_path))) for _ in range(2))
    mine.append(batch(up("p", "1")))
    theirs.append(batch(up("p", "2")))
    assert mine.append(batch(up("p", "3"))) == Counts(ingested=1, superseded=1)
    assert [entry.seq for entry in mine.history()] == [0, 1, 2]


def test_the_same_file_read_twice_at_the_same_time_lands_once(tmp_path: Path) -> None:
    one = Batch("f", tuple((row, up(f"p{row}", "t")) for row in range(20)), (Rejection(99, "bad", "raw"),))
    start, counts = threading.Barrier(4), []

    def append() -> None:
        log = EditLog(ObjectStore(str(tmp_path)))
        start.wait()
        counts.append(log.append(one))

    threads = [threading.Thread(target=append) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(count.ingested for count in counts) == [0, 0, 0, 20]
    log = EditLog(ObjectStore(str(tmp_path)))
    assert len(log.history()) == 20
    assert len(log.quarantine()) == 1


def test_a_crash_between_quarantine_and_log_is_completed_by_the_next_run(
    log: EditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Batch("f", ((1, up("p", "1")),), (Rejection(2, "bad", "raw"),))

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(log_append, "decide", crash)
        with pytest.raises(KeyboardInterrupt):
            log.append(one)
    assert (log.live(), len(log.quarantine())) == ([], 1)
    assert log.append(one) == Counts(ingested=1, quarantined=1)
    assert (len(log.live()), len(log.quarantine())) == (1, 1)


def test_an_older_answer_comes_back_with_again_and_not_without(log: EditLog) -> None:
    first, second = (Batch(source=name, edits=((1, Edit(prompt="Who?", target=name)),)) for name in ("a", "b"))
    log.append(first)
    log.append(second)
    moved = Batch(source="elsewhere", edits=first.edits)
    assert log.append(moved).ingested == 0
    assert log.append(moved, again=True).superseded == 1
    assert [entry.edit.target for entry in log.live()] == ["a"]
    assert log.append(moved, again=True).unchanged == 1


def test_a_file_that_is_overwritten_speaks_where_a_row_changed(log: EditLog) -> None:
    for day, target in enumerate(["a", "b", "a"]):
        # Each day's file holds a new last row, so it is never the same file as before.
        rows = ((1, Edit(prompt="Who?", target=target)), (2, Edit(prompt=f"Day {day}?", target="yes")))
        assert log.append(Batch(source="daily.jsonl", edits=rows)).ingested == 2
    assert next(entry.edit.target for entry in log.live() if entry.edit.prompt == "Who?") == "a"


def stream(log: EditLog, *batches: Batch) -> Counts:
    with log.appending() as appending:
        for one in batches:
            appending.add(one.columns())
        return appending.commit()


def test_nothing_of_a_stream_is_seen_before_its_commit(log: EditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_files, "FILE_ROWS", 1)
    log.append(batch(up("p", "1")))
    before = state(log)

    def give_up() -> None:
        with log.appending() as appending:
            for number in range(5):
                appending.add(batch(up(f"q{number}", "1"), source=str(number)).columns())
            assert state(log) == before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        give_up()
    assert state(log) == before
    assert len(list(Path(log._store.uri, "edits").glob("*.parquet"))) == 1


def test_compacting_changes_files_and_nothing_that_the_log_says(log: EditLog) -> None:
    for number in range(5):
        log.append(
            Batch(str(number), ((1, up("p", str(number))), (2, up(f"q{number}", "1"))), (Rejection(3, "bad", "raw"),))
        )
    folder = Path(log._store.uri, "edits")
    (folder / "part-left-by-a-killed-ingest.snappy.parquet").write_bytes(b"PAR1")
    version, before = log.version(), (log.history(), log.live(), log.quarantine())
    assert log.compact() == 0
    assert (log.history(), log.live(), log.quarantine()) == before
    assert version is not None and log.live(version) == before[1]
    removed = 0
    for name in ("edits", "quarantine"):
        table = delta_table.open_table(log._store, name)
        assert table is not None
        removed += delta_table.compact(log._store, table, keep_hours=0)
    assert removed > 5
    assert (log.history(), log.live(), log.quarantine()) == before
    assert len(list(folder.glob("*.parquet"))) == 1
    assert (log.length(version), log.length()) == (10, 10)  # though the files of that version are gone
    assert log.append(batch(up("p", "4"), source="elsewhere")) == Counts(unchanged=1)
    assert log.append(batch(up("p", "6"), source="elsewhere")) == Counts(ingested=1, superseded=1)
    assert [entry.seq for entry in log.history()] == list(range(11))


@given(st.lists(st.lists(EDITS, min_size=1, max_size=3), min_size=2, max_size=6), st.lists(EDITS, max_size=3))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_posts_in_one_commit_say_what_they_say_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, posts: list[list[Edit]], file: list[Edit]
) -> None:
    together, apart = (EditLog(ObjectStore(str(tmp_path_factory.mktemp("store")))) for _ in range(2))
    batches = [
        Batch("posts", tuple(enumerate(edits, start=1)), after=str(number)) for number, edits in enumerate(posts)
    ]
    half = len(batches) // 2
    told, one_by_one = (
        together.append_together(batches[:half]),
        [apart.append(one, again=True) for one in batches[:half]],
    )
    for log in (together, apart):  # behind the back of what is kept between calls
        log.append(batch(*file, source="a file"))
    told += together.append_together(batches[half:])
    one_by_one += [apart.append(one, again=True) for one in batches[half:]]
    # `append` calls a row that its own batch says twice a duplicate; here it says nothing new.
    assert [(one.ingested, one.superseded, one.retracted, one.rows) for one in told] == [
        (one.ingested, one.superseded, one.retracted, one.rows) for one in one_by_one
    ]
    assert [(entry.edit, entry.row) for entry in together.history()] == [
        (entry.edit, entry.row) for entry in apart.history()
    ]


def test_two_compactions_do_not_overlap(log: EditLog) -> None:
    """Delta would let both replace the same files, and the log would then say everything twice."""
    for number in range(3):
        log.append(batch(up("p", str(number)), source=str(number)))
    before = log.history()
    with log._compacting(), pytest.raises(StoreError, match="is being compacted since"):
        log.compact()
    assert log.compact() == 0
    assert log.history() == before


def test_a_compaction_that_was_killed_does_not_forbid_it_for_ever(
    log: EditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append(batch(up("p", "1")))
    log._store.create(edit_log.COMPACTING, b"")
    monkeypatch.setattr(edit_log, "LONGEST_COMPACTION", timedelta(0))
    assert log.compact() == 0
    assert not log._store.exists(edit_log.COMPACTING)


def test_posts_that_say_nothing_new_leave_the_log_as_it_is(log: EditLog) -> None:
    assert log.append_together([Batch("posts", ((1, up("p", "1")),), after="a")])[0].ingested == 1
    version = log.version()
    assert log.append_together([Batch("posts", ((1, up("p", "1")),), after="b")])[0].unchanged == 1
    assert log.append_together([]) == []
    assert log.version() == version


def test_what_came_since_is_what_the_whole_history_ends_with(log: EditLog) -> None:
    for number in range(4):  # every second row repeats the first: `seq` gets gaps
        log.append(batch(up("p", str(number)), up("p", str(number)), up(f"q{number}", "1"), source=str(number)))
    history = log.history()
    assert log.length() == len(history) == 8
    for since in range(10):
        assert log.history(since=since) == history[since:]
    log.append(batch(up("more", "1"), source="more"))
    (entry,) = log.history(since=8)  # goes on where the last reading ended
    assert entry == log.history()[8]
