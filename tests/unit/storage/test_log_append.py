"""One ingest beside others, and with every answer of the store: nothing is lost, doubled or out of order."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.edits import Edit
from pipeline.errors import ConfigError, OutcomeUnknown, StoreError
from pipeline.storage import delta_table, log_append, staged_files
from pipeline.storage.batches import Batch, Counts, Rejection
from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import ObjectStore
from tests.unit.storage.rules import Model
from tests.unit.storage.test_batches import EDITS, batch, up

SOURCES = st.sampled_from(["f", "g"])
BATCHES = st.builds(
    lambda source, edits: batch(*edits, source=source), SOURCES, st.lists(EDITS, min_size=1, max_size=4)
)
CALLS = st.lists(BATCHES, min_size=1, max_size=3)
INGESTS = st.tuples(st.just("ingest"), CALLS, st.sampled_from([False, False, True]))
ACTIONS = st.one_of(INGESTS, INGESTS, st.tuples(st.just("retract"), EDITS), st.tuples(st.just("compact")))


@pytest.fixture
def log(tmp_path: Path) -> EditLog:
    return EditLog(ObjectStore(str(tmp_path)))


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_files, "FILE_ROWS", 2)


def stream(log: EditLog, *batches: Batch, again: bool = False) -> Counts:
    with log.appending(again=again) as appending:
        for one in batches:
            appending.add(one.columns())
        return appending.commit()


def act(log: EditLog, model: Model, action: tuple[Any, ...]) -> None:
    if action[0] == "ingest":
        assert stream(log, *action[1], again=action[2]) == model.ingest(action[1], again=action[2])
    elif action[0] == "retract":
        log.retract([action[1].slot_id])
        model.retract(action[1])
    else:
        log.compact()


def said(log: EditLog) -> list[tuple[str, int, Edit]]:
    entries = log.history()
    assert [entry.seq for entry in entries] == list(range(len(entries)))
    return [(entry.source, entry.row, entry.edit) for entry in entries]


def intact(log: EditLog) -> None:
    """Every file that a version refers to is there."""
    folder = Path(log._store.uri, "edits")
    version = log.version()
    assert version is not None
    for number in range(version + 1):
        assert all((folder / path).is_file() for path in _paths(DeltaTable(str(folder), version=number)))


def _paths(table: DeltaTable) -> list[str]:
    paths: list[str] = pa.table(table.get_add_actions(flatten=True))["path"].to_pylist()
    return paths


P, Q = up("p", "1"), up("p", "2")
P_ELSEWHERE, Q_ELSEWHERE = (("ingest", [batch(edit, source="g")], False) for edit in (P, Q))


@given(
    st.lists(ACTIONS, max_size=2),
    CALLS,
    st.booleans(),
    st.lists(st.lists(ACTIONS, min_size=1, max_size=2), max_size=3),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# What was unchanged after the first lost commit is new after the second.
@example([], [batch(P, up("q", "1"))], False, [[P_ELSEWHERE], [Q_ELSEWHERE]])
# What was heard from the row when the ingest began is no longer the last thing heard from it.
@example([("ingest", [batch(P)], False)], [batch(P, up("q", "1"))], False, [[("ingest", [batch(Q)], False)]])
# The rival read the same row of the same file, and was then taken back: the row must not speak again.
@example([], [batch(P, up("q", "1"))], False, [[("ingest", [batch(P)], False)], [("retract", P)]])
def test_an_ingest_that_loses_its_turn_says_what_it_would_say_behind_the_others(
    tmp_path_factory: pytest.TempPathFactory,
    before: list[tuple[Any, ...]],
    mine: list[Batch],
    again: bool,
    rivals: list[list[tuple[Any, ...]]],
) -> None:
    """Rivals commit before each of the commits that are tried: the log is as if one had come
    after the other, in the order of their commits."""
    log, model = EditLog(ObjectStore(str(tmp_path_factory.mktemp("store")))), Model()
    for action in before:
        act(log, model, action)
    real: Any = log_append.commit_files
    waiting = [*rivals]

    def after_the_rivals(*arguments: Any, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(log_append, "commit_files", real)
            for action in waiting.pop(0) if waiting else ():
                act(EditLog(log._store), model, action)
        real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_append, "commit_files", after_the_rivals)
        counts = stream(log, *mine, again=again)
    assert counts == model.ingest(mine, again=again)
    assert said(log) == model.entries
    intact(log)
    version = log.version()
    assert stream(log, *mine).ingested == 0
    assert (said(log), log.version()) == (model.entries, version)


@given(CALLS, CALLS, st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_two_long_ingests_end_in_one_order_whoever_commits_first(
    tmp_path_factory: pytest.TempPathFactory, first: list[Batch], second: list[Batch], data: st.DataObject
) -> None:
    store = ObjectStore(str(tmp_path_factory.mktemp("store")))
    model = Model()
    with EditLog(store).appending() as one, EditLog(store).appending() as other:
        left = {one: [*first], other: [*second]}
        while any(left.values()):
            stream = data.draw(st.sampled_from([stream for stream in (one, other) if left[stream]]))
            stream.add(left[stream].pop(0).columns())
        for stream in data.draw(st.permutations([one, other])):
            assert stream.commit() == model.ingest(first if stream is one else second)
    assert said(EditLog(store)) == model.entries
    intact(EditLog(store))


def lost_and_not_landed(real: Callable[..., None], *arguments: Any, **options: Any) -> None:
    raise DeltaError("connection reset")


def lost_and_landed(real: Callable[..., None], *arguments: Any, **options: Any) -> None:
    real(*arguments, **options)
    raise DeltaError("connection reset")


def sent_twice(real: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """The client repeats a put whose answer was lost, and meets what it wrote itself."""
    real(*arguments, **options)
    raise CommitFailedError("Commit failed: a concurrent transaction deleted or changed the same data")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What becomes of the commits to come, in order; afterwards they succeed."""
    real: Any = DeltaTable.create_write_transaction
    coming: list[Any] = []

    def answered(*arguments: Any, **options: Any) -> None:
        (coming.pop(0) if coming else lambda real, *a, **o: real(*a, **o))(real, *arguments, **options)

    monkeypatch.setattr(DeltaTable, "create_write_transaction", answered)
    return coming


MINE = [batch(up("p", "1"), up("q", "1"), up("r", "1")), batch(up("p", "2"), source="g")]


@pytest.mark.parametrize("answer", [lost_and_landed, sent_twice])
def test_a_commit_that_landed_is_recognised_though_its_answer_was_lost(
    log: EditLog, answers: list[Any], answer: Any
) -> None:
    answers.append(answer)
    assert stream(log, *MINE) == Counts(ingested=4, superseded=1)
    intact(log)
    assert [edit.target for *_, edit in said(log)] == ["1", "1", "1", "2"]
    assert stream(log, *MINE) == Counts(unchanged=4)


def test_nothing_is_deleted_while_nobody_knows_whether_a_commit_will_land(log: EditLog, answers: list[Any]) -> None:
    """The store answers nothing, the commit is not there yet, and lands a moment later."""
    late: list[Callable[[], None]] = []

    def later(real: Any, *arguments: Any, **options: Any) -> None:
        late.append(lambda: real(*arguments, **options))
        raise DeltaError("connection reset")

    answers.append(later)
    with pytest.raises(OutcomeUnknown, match="run the same command again"):
        stream(log, *MINE)
    late[0]()
    intact(log)
    assert [edit.target for *_, edit in said(log)] == ["1", "1", "1", "2"]
    assert stream(log, *MINE) == Counts(unchanged=4)


def test_a_commit_that_never_landed_is_made_good_by_the_same_call(log: EditLog, answers: list[Any]) -> None:
    answers.append(lost_and_not_landed)
    with pytest.raises(OutcomeUnknown):
        stream(log, *MINE)
    assert said(log) == []
    assert stream(log, *MINE) == Counts(ingested=4, superseded=1)
    intact(log)


def test_a_retraction_whose_commit_was_sent_twice_is_told_as_made(
    log: EditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream(log, *MINE)
    real: Any = delta_table.write_deltalake
    monkeypatch.setattr(delta_table, "write_deltalake", lambda *a, **o: sent_twice(real, *a, **o))
    assert [entry.edit.prompt for entry in log.retract([MINE[0].edits[1][1].slot_id])] == ["q"]


@pytest.mark.parametrize("moment", ["add", "settle", "commit_files"])
def test_an_ingest_that_is_killed_leaves_the_log_as_it_was(
    log: EditLog, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    class Killed(BaseException): ...

    stream(log, batch(up("p", "0"), source="before"))
    before = said(log), log.version()

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(staged_files.StagedFiles, "discard", lambda *_, **__: None)  # nobody cleans up behind a kill
        patch.setattr(log_append if moment == "commit_files" else staged_files.StagedFiles, moment, kill)
        with pytest.raises(Killed):
            stream(log, *MINE)
    assert (said(log), log.version()) == before
    assert stream(log, *MINE) == Counts(ingested=4, superseded=2)
    intact(log)


def test_a_file_that_was_removed_before_the_commit_is_a_sentence(log: EditLog) -> None:
    stream(log, batch(up("p", "0"), source="before"))
    before = said(log)
    with log.appending() as appending:
        appending.add(MINE[0].columns())
        appending._staged._collect(0)
        (Path(log._store.uri, "edits") / appending._staged._files[0].path).unlink()
        with pytest.raises(StoreError, match=r"were removed .* while it ran; nothing of it landed, run it again"):
            appending.commit()
    assert said(log) == before


def test_an_ingest_that_outlasts_what_compaction_keeps_lands_nothing(
    log: EditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged_files, "LONGEST", timedelta(0))
    with pytest.raises(StoreError, match="more than 12 hours"):
        stream(log, *MINE)
    assert said(log) == []


def test_compaction_keeps_what_an_ingest_beside_it_has_staged(log: EditLog) -> None:
    stream(log, batch(up("p", "0"), source="before"))
    with log.appending() as appending:
        for one in MINE:
            appending.add(one.columns())
        log.compact()
        assert appending.commit() == Counts(ingested=4, superseded=2)
    intact(log)
    with pytest.raises(ConfigError, match="at least 24"):
        log.compact(keep_hours=23)


def test_a_version_whose_files_compaction_removed_says_so(log: EditLog) -> None:
    for number in range(3):
        stream(log, batch(up("p", str(number)), source=str(number)))
    version = log.version()
    table = delta_table.open_table(log._store, "edits")
    assert version is not None and table is not None
    assert delta_table.compact(log._store, table, keep_hours=0) == 3
    for read in (log.live, log.history, log.slots):
        with pytest.raises(StoreError, match="compact"):
            read(version)
    assert [entry.edit.target for entry in log.live()] == ["2"]


def test_a_rival_that_commits_at_every_turn_ends_in_a_sentence(log: EditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.edit_log.MOST_ATTEMPTS", 4)
    monkeypatch.setattr("time.sleep", lambda _: None)
    real: Any = log_append.commit_files
    rivals = iter(range(100))

    def after_a_rival(*arguments: Any, **options: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(log_append, "commit_files", real)
            stream(EditLog(log._store), batch(up("rival", str(next(rivals))), source="rival"))
        real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(log_append, "commit_files", after_a_rival)
        with pytest.raises(StoreError, match="others kept writing first; nothing of this call landed"):
            stream(log, *MINE)
    assert len(said(log)) == 3
    assert len(list(Path(log._store.uri, "edits").glob("*.parquet"))) == 3


def test_an_ingest_that_loses_its_turn_writes_no_file_again_unless_its_rows_changed(
    log: EditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Any = log_append.commit_files
    written: list[object] = []
    write: Any = staged_files.StagedFiles._write
    with log.appending() as appending:
        appending.add(batch(*(up(f"p{number}", "1") for number in range(6))).columns())
        appending.add(batch(*(up(f"q{number}", "1") for number in range(6)), source="g").columns())

        def after_a_rival(*arguments: Any, **options: Any) -> None:
            monkeypatch.setattr(log_append, "commit_files", real)
            stream(EditLog(log._store), batch(up("p3", "1"), source="rival"))
            monkeypatch.setattr(staged_files.StagedFiles, "_write", lambda *a: (written.append(a), write(*a))[1])
            real(*arguments, **options)

        monkeypatch.setattr(log_append, "commit_files", after_a_rival)
        assert appending.commit() == Counts(ingested=11, unchanged=1)
    assert len(written) == 1


def test_a_row_behind_a_silent_one_that_says_the_same_speaks(log: EditLog) -> None:
    """The file's old row is silent; its new row says the same, and means it: the answer returns."""
    stream(log, batch(P))
    stream(log, batch(Q, source="g"))
    assert stream(log, batch(P, P)) == Counts(ingested=1, unchanged=1, superseded=1)
    assert [entry.edit.target for entry in log.live()] == ["1"]
    stream(log, batch(Q, up("r", "1"), source="h"))
    assert [entry.edit.target for entry in log.live()] == ["2", "1"]
    assert stream(log, batch(P, P), batch(P, up("s", "1"), source="i")) == Counts(ingested=2, unchanged=2, superseded=1)


def test_refused_rows_are_kept_though_the_ingest_is_not(log: EditLog, answers: list[Any]) -> None:
    one = Batch("f", ((1, P),), (Rejection(2, "bad", "raw"),))
    answers.append(lost_and_not_landed)
    with pytest.raises(OutcomeUnknown):
        log.append(one)
    assert len(log.quarantine()) in (0, 1)
    log.append(one)
    assert len(log.quarantine()) == 1


def test_a_file_that_grew_is_known_up_to_its_first_new_batch_and_not_searched_for_behind_it(
    log: EditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    file: list[Batch] = []
    for number in range(5):
        rows = ((2 * number, up(f"p{number}", "1")), (2 * number + 1, up("same", "1")))
        file.append(Batch("file", rows, (), file[-1].batch_id if file else ""))
    assert stream(log, *file[:2]) == Counts(ingested=3, duplicates=1)
    stream(log, batch(up("same", "2"), source="g"))
    searched: list[str] = []
    real = log_append.was_committed
    monkeypatch.setattr(
        log_append, "was_committed", lambda store, table, name: (searched.append(name), real(store, table, name))[1]
    )
    assert stream(log, *file) == Counts(ingested=4, unchanged=4, superseded=1, duplicates=2)
    assert searched == [one.batch_id for one in file[:3]]


def test_files_without_statistics_are_read_for_what_these_would_say(
    log: EditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(staged_files, "_stats", lambda rows: f'{{"numRecords": {rows.num_rows}}}')
        stream(log, *MINE)
    stream(log, batch(up("p", "3"), source="h"))
    log.retract([P.slot_id])
    stream(log, batch(up("p", "4"), source="i"))
    assert [(edit.op, edit.target) for *_, edit in said(log)][3:] == [
        ("upsert", "2"),
        ("upsert", "3"),
        ("retract", ""),
        ("upsert", "4"),
    ]
