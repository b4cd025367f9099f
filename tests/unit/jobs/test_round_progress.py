"""The progress view of a round, on a terminal and without one."""

import io
from collections.abc import Iterator, Sequence

import pytest
from rich.console import Console

from jobs.round_progress import MOST_ROWS, RoundProgress
from pipeline.edits import Edit
from pipeline.errors import GateFailed
from pipeline.round_diary import Event, PhaseStarted, ShardNews
from pipeline.training.fit import Progress
from pipeline.training.planning import ShardPlan

EDIT = Edit(prompt="The capital of Qern is", target="Vell")


def shard(index: int) -> ShardPlan:
    return ShardPlan(digest=f"{index:024x}", index=index, edits=(EDIT,) * 25)


def trained(index: int, *, holding: int = 60) -> ShardNews:
    return ShardNews(2, shard(index), Progress(step=40, loss=0.1234, holding=holding, wordings=125))


def finished(index: int) -> ShardNews:
    return ShardNews(2, shard(index), None)


def reused(index: int) -> ShardNews:
    return ShardNews(2, shard(index), None, reused=True)


def seconds() -> Iterator[float]:
    """A clock that gains a second whenever it is read."""
    now = 0.0
    while True:
        yield now
        now += 1.0


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=60)


def terminal(*, width: int = 100, height: int = 40) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, _environ={"TERM": "xterm"})


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def frame(progress: RoundProgress, *, width: int = 100, height: int = 40) -> list[str]:
    """The view as it is now, as lines without styles."""
    console = Console(file=io.StringIO(), force_terminal=False, width=width, height=height)
    console.print(progress)
    return written(console).splitlines()


def run(progress: RoundProgress, events: Sequence[Event], error: BaseException) -> None:
    with progress:
        for event in events:
            progress(event)
        raise error


def test_without_a_terminal_one_line_per_phase_and_per_finished_shard() -> None:
    console = plain_console()
    clock = seconds()
    with RoundProgress(console, clock=lambda: next(clock)) as progress:
        progress(PhaseStarted("plan", "reading the edit log"))
        progress(PhaseStarted("train", "1 of 2 shards", shards=1))
        progress(reused(0))
        for holding in (10, 60, 125):
            progress(trained(1, holding=holding))
        progress(finished(1))
        progress(PhaseStarted("merge", "1 memories by keyed"))
    lines = written(console).splitlines()
    assert [line.split(" s  ")[1] for line in lines] == [
        "plan: reading the edit log",
        "train: 1 of 2 shards",
        "shard 2/1 finished: 25 edits, 40 steps, 125 of 125 wordings hold, loss 0.123",
        "merge: 1 memories by keyed",
        "done",
    ]
    elapsed = [float(line.split(" s  ")[0]) for line in lines]
    assert elapsed == sorted(set(elapsed))


def test_without_a_terminal_no_control_characters() -> None:
    console = plain_console()
    with RoundProgress(console) as progress:
        progress(PhaseStarted("train", "[bold]1 of 1 shards", shards=1))
        progress(finished(0))
    assert "[bold]1 of 1 shards" in written(console)
    assert all(character.isprintable() for character in written(console).replace("\n", ""))
    assert written(console).isascii()


def test_a_dumb_terminal_gets_plain_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with RoundProgress(console) as progress:
        progress(PhaseStarted("plan", "reading the edit log"))
    assert "plan: reading the edit log\n" in written(console)
    assert "\x1b" not in written(console)


def test_the_view_has_a_row_per_shard_and_a_mark_per_phase() -> None:
    with RoundProgress(terminal()) as progress:
        progress(PhaseStarted("plan", "reading the edit log"))
        progress(PhaseStarted("train", "4 of 5 shards", shards=4))
        progress(reused(0))
        progress(trained(1))
        progress(trained(2))
        progress(trained(3, holding=125))
        progress(finished(3))
        lines = frame(progress)
    assert lines[0].startswith("✓ plan")
    assert lines[1].startswith("› train")
    rows = {line.split()[0]: line.split() for line in lines[3:-1]}
    assert rows["2/0"] == ["2/0", "25", "reused"]
    assert rows["2/1"][:5] == ["2/1", "25", "40", "60/125", "0.123"]
    assert rows["2/3"][-1] == "finished"
    assert lines[-1].split(", ") == ["  1 finished", "2 training", "1 reused", "1 waiting"]


def test_seconds_count_up_and_stand_still_when_a_phase_is_over() -> None:
    now = 100.0
    progress = RoundProgress(terminal(), clock=lambda: now)
    progress(PhaseStarted("plan", ""))
    now = 103.0
    assert "3.0 s" in frame(progress)[0]
    progress(PhaseStarted("train", "1 of 1 shards", shards=1))
    now = 110.0
    plan, train = frame(progress)
    assert "3.0 s" in plan
    assert "7.0 s" in train


@pytest.mark.parametrize("shards", [3, 200])
def test_sixty_columns_hold_every_line(shards: int) -> None:
    progress = RoundProgress(terminal(width=60))
    progress(
        PhaseStarted(
            "train", f"{shards} of {shards} shards in a cluster with a very long name, far away", shards=shards
        )
    )
    for index in range(shards):
        progress(ShardNews(1234, shard(index), Progress(step=15000, loss=1.234e-5, holding=50000, wordings=50000)))
    lines = frame(progress, width=60)
    assert any("1234/0" in line and "50000/50000" in line and "1.23e-05" in line for line in lines)
    assert len(lines) == len(frame(progress, width=200)), "a line was wrapped"


def test_of_many_shards_only_those_in_training_have_a_row() -> None:
    progress = RoundProgress(terminal())
    progress(PhaseStarted("train", "200 of 200 shards", shards=200))
    for index in range(MOST_ROWS + 1):
        progress(trained(index))
        progress(finished(index))
    progress(trained(150))
    lines = frame(progress)
    assert [line.split()[0] for line in lines if line.strip().startswith("2/")] == ["2/150"]
    assert lines[-1].strip() == f"{MOST_ROWS + 1} finished, 1 training, {200 - MOST_ROWS - 2} waiting"


def test_the_view_is_not_taller_than_the_terminal() -> None:
    console = terminal(height=24)
    progress = RoundProgress(console)
    progress(PhaseStarted("train", "200 of 200 shards", shards=200))
    for index in range(200):
        progress(trained(index))
    for name in ("merge", "evaluate", "publish"):
        progress(PhaseStarted(name, ""))
    assert len(frame(progress, height=24)) < 24


def test_a_failed_gate_closes_the_view_and_marks_the_phase() -> None:
    console = terminal()
    progress = RoundProgress(console)
    events: list[Event] = [
        PhaseStarted("train", "1 of 1 shards", shards=1),
        trained(0),
        finished(0),
        PhaseStarted("evaluate", "25 edits"),
    ]
    with pytest.raises(GateFailed):
        run(progress, events, GateFailed("missed", ()))
    lines = frame(progress)
    assert lines[0].startswith("✓ train")
    assert lines[-1].startswith("✗ evaluate")
    assert written(console).count("\x1b[?25l") == written(console).count("\x1b[?25h") == 1, "the cursor is back"


def test_a_crash_in_training_leaves_no_shard_that_seems_to_go_on() -> None:
    progress = RoundProgress(terminal())
    with pytest.raises(KeyboardInterrupt):
        run(progress, [PhaseStarted("train", "2 of 2 shards", shards=2), trained(0)], KeyboardInterrupt())
    lines = frame(progress)
    assert lines[0].startswith("✗ train")
    assert lines[2].split()[-1] == "stopped"
    assert lines[-1].strip() == "1 stopped, 1 waiting"


def test_progress_is_not_printed_where_results_are(capsys: pytest.CaptureFixture[str]) -> None:
    with RoundProgress() as progress:
        progress(PhaseStarted("plan", "reading the edit log"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "plan: reading the edit log" in captured.err
