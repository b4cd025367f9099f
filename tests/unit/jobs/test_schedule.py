"""The schedule on a clock of its own: rounds are real processes that end as they are told, waiting costs nothing."""

import gc
import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.errors import ConfigError, OutcomeUnknown
from pipeline.storage.object_store import ObjectStore

pytest.importorskip("croniter")
from jobs.due_times import DueTimes, due_times
from jobs.schedule import ATTEMPTS, NOTES, Rounds, Schedule, note_of

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
TWO = due_times("0 2 * * *", timezone="UTC")
MOMENTS = st.datetimes(min_value=datetime(2024, 1, 1), max_value=datetime(2028, 1, 1), timezones=st.just(UTC))


class Clock:
    """Stands in for the event that says stop: waiting moves the clock, and `end` stops it."""

    def __init__(self, start: datetime, end: datetime) -> None:
        self.time, self.end, self.told = start, end, False

    def is_set(self) -> bool:
        return self.told or self.time >= self.end

    def set(self) -> None:
        self.told = True

    def wait(self, seconds: float) -> bool:
        self.time += timedelta(seconds=max(seconds, 0.001))
        return self.is_set()


class Recorded(Rounds):
    """Ends with the next of `codes`, the last of which stays, and takes `minutes`."""

    def __init__(self, clock: Clock, codes: list[int], minutes: float = 5) -> None:
        super().__init__([])
        self.stopped: Any = clock
        self.codes, self.minutes = codes, minutes
        self.started: list[datetime] = []

    def run(self) -> int:
        self.started.append(self.stopped.time)
        self.stopped.time += timedelta(minutes=self.minutes)
        return self.codes.pop(0) if len(self.codes) > 1 else self.codes[0]


@pytest.fixture
def keep(tmp_path: Path) -> Callable[..., Recorded]:
    """The schedule over some days, in one run of its process."""

    def keep(
        start: datetime, *, hours: float, codes: list[int] | None = None, catch_up: bool = True, **more: Any
    ) -> Recorded:
        clock = Clock(start, start + timedelta(hours=hours))
        rounds = Recorded(clock, codes or [0], more.pop("minutes", 5))
        store = more.pop("store", ObjectStore(str(tmp_path / "store")))
        Schedule(store, TWO, now=lambda: clock.time, **more).run(rounds, catch_up=catch_up)
        return rounds

    return keep


def nights(rounds: Recorded) -> list[str]:
    return [f"{moment:%d %H:%M}" for moment in rounds.started]


def test_a_round_a_night(keep: Callable[..., Recorded], tmp_path: Path) -> None:
    assert nights(keep(NOON, hours=60)) == ["22 02:00", "23 02:00"]
    store = ObjectStore(str(tmp_path / "store"))
    assert store.list(NOTES) == [f"schedule/2026-11-{day}T0200Z.json" for day in (21, 22, 23)]
    assert json.loads(store.read(note_of(TWO.after(NOON))))["exit_status"] == 0


@pytest.mark.parametrize(("catch_up", "expected"), [(True, ["24 12:00", "25 02:00"]), (False, ["25 02:00"])])
def test_nights_that_were_missed_are_one_round(
    keep: Callable[..., Recorded], catch_up: bool, expected: list[str]
) -> None:
    assert nights(keep(NOON, hours=1)) == []
    assert nights(keep(NOON + timedelta(days=3), hours=24, catch_up=catch_up)) == expected


def test_a_restart_repeats_nothing(keep: Callable[..., Recorded]) -> None:
    assert nights(keep(NOON, hours=24)) == ["22 02:00"]
    assert nights(keep(NOON + timedelta(hours=24), hours=1)) == []


def test_a_stop_during_a_round_leaves_the_night_to_the_next_start(keep: Callable[..., Recorded]) -> None:
    stopped = keep(NOON, hours=14.05)  # three minutes into it
    assert nights(stopped) == ["22 02:00"]
    assert nights(keep(NOON + timedelta(hours=15), hours=1)) == ["22 03:00"]


def test_a_round_that_fails_is_tried_again_and_then_noted(keep: Callable[..., Recorded], tmp_path: Path) -> None:
    assert nights(keep(NOON, hours=24, codes=[1, 0])) == ["22 02:00", "22 02:15"]
    failing = keep(NOON + timedelta(days=1), hours=48, codes=[1])
    assert nights(failing) == [f"{day} 02:{minute}" for day in (23, 24) for minute in ("00", "15", "30")]
    assert len(failing.started) == 2 * ATTEMPTS
    note = json.loads((tmp_path / "store" / note_of(TWO.until(NOON + timedelta(days=2)))).read_text())
    assert note["exit_status"] == 1


def test_a_round_longer_than_a_night_is_followed_by_one(keep: Callable[..., Recorded]) -> None:
    assert nights(keep(NOON, hours=90, minutes=60 * 50)) == ["22 02:00", "24 04:00"]


def test_a_store_that_is_away_ends_nothing(keep: Callable[..., Recorded], tmp_path: Path) -> None:
    class Away(ObjectStore):
        calls = 0

        def exists(self, path: str) -> bool:
            self.calls += 1
            if self.calls == 2:  # the first is the start's
                raise OutcomeUnknown("The store went silent.")
            return super().exists(path)

    assert nights(keep(NOON, hours=24, store=Away(str(tmp_path / "store")))) == ["22 02:10"]


def test_jitter_is_late_and_never_early(keep: Callable[..., Recorded]) -> None:
    random.seed(1)
    for start in keep(NOON, hours=100, jitter=600).started:
        assert timedelta(0) <= start - TWO.until(start) <= timedelta(seconds=600)


@example(datetime(2024, 10, 27, 1, tzinfo=UTC), "Europe/Berlin")  # 02:00, shown for the second time
@example(datetime(2024, 10, 27, 2, tzinfo=UTC), "Europe/Berlin")
@example(datetime(2024, 10, 27, 0, 59, 59, 999999, tzinfo=UTC), "Europe/Berlin")  # before clocks go back
@given(MOMENTS, st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu"]))
def test_due_times_are_in_order_and_none_lies_between(moment: datetime, zone: str) -> None:
    for cron in ("0 2 * * *", "30 2 * * 1-5", "*/20 * * * *"):
        times = due_times(cron, timezone=zone)
        last, first = times.until(moment), times.after(moment)
        assert last <= moment < first
        assert times.until(last) == last
        assert times.after(last) == first
        assert times.until(first - timedelta(seconds=1)) == last


def test_the_clocks_change() -> None:
    berlin: DueTimes = due_times("30 2 * * *", timezone="Europe/Berlin")
    spring, autumn = datetime(2026, 3, 28, 12, tzinfo=UTC), datetime(2026, 10, 24, 12, tzinfo=UTC)
    assert berlin.after(spring) == datetime(2026, 3, 29, 1, tzinfo=UTC)  # 02:30 is skipped; clocks then show 03:00
    assert berlin.after(berlin.after(autumn)) == datetime(2026, 10, 25, 1, 30, tzinfo=UTC)  # 02:30 comes twice


@pytest.mark.parametrize(
    ("cron", "zone"),
    [
        ("0 25 * * *", "UTC"),
        ("0 2 * *", "UTC"),
        ("0 0 2 * * *", "UTC"),
        ("0 0 31 2 *", "UTC"),
        ("0 2 * * *", "Mars/Base"),
    ],
)
def test_what_is_no_schedule_is_said(cron: str, zone: str) -> None:
    with pytest.raises(ConfigError):
        due_times(cron, timezone=zone)


@pytest.mark.timeout(60)
def test_a_stop_is_heard_at_any_moment_of_a_wait() -> None:
    """A signal handler runs between two lines of the code that it interrupts, and must not wait for what that holds."""
    lines = 0
    heard: list[bool] = []

    def wait(*, told_at: int | None) -> None:
        nonlocal lines
        rounds, lines = Rounds([]), 0

        def interrupted(frame: FrameType, event: str, _: object) -> Any:
            nonlocal lines
            if event == "line":
                lines += 1
                if lines == told_at:
                    rounds.stop()
            return interrupted

        sys.settrace(interrupted)
        told = rounds.stopped.wait(0.01)
        sys.settrace(None)
        heard.append(told)

    def waited(told_at: int | None) -> bool:
        thread = threading.Thread(target=wait, kwargs={"told_at": told_at}, daemon=True)
        thread.start()
        thread.join(20)
        return not thread.is_alive()

    gc.disable()  # what it calls would be counted
    try:
        assert waited(None) and lines
        assert all(waited(told_at) for told_at in range(1, lines + 1))
    finally:
        gc.enable()
    assert heard == [False] + [True] * (len(heard) - 1)


def test_sigterm_ends_the_schedule_and_its_round(tmp_path: Path) -> None:
    """The command itself, with a round that would go on for long."""
    program = (
        "import sys, jobs.schedule as s;"
        "real = s.Rounds.__init__;"
        "s.Rounds.__init__ = lambda self, command: real(self, [sys.executable, '-c',"
        " 'import time; print(1, flush=True); time.sleep(600)']);"
        "s.Schedule._first = lambda self, catch_up: self.times.until(self.now());"
        f"sys.argv = ['wiseline', 'schedule', '--cron', '0 2 * * *', '--set', 'store.uri={tmp_path}'];"
        "import jobs.cli; jobs.cli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    assert process.stdout is not None
    assert "Next round" in process.stdout.readline()
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert not list(tmp_path.glob("schedule/*"))
