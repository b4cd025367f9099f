"""`wiseline schedule`: rounds at the times of a cron expression, where no Kubernetes, systemd or cron does it.

What was run is noted in the store, one small object per due time. A scheduler that was restarted, or a second one on
another host, reads there what is left to do; where both run a round, the round itself publishes once.
"""

import contextlib
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jobs.options import ConfigOption, SetOption
from pipeline.config import load_config
from pipeline.errors import AlreadyExists, StoreError

if TYPE_CHECKING:
    from jobs.due_times import DueTimes
    from pipeline.storage.object_store import ObjectStore

NOTES = "schedule"
ATTEMPTS = 3  # of one due time
PAUSE_SECONDS = 600.0  # between them, and before a store that does not answer is asked again
LOOK_SECONDS = 30.0  # a host that slept, or whose clock was set, notices within this


def schedule_command(
    cron: Annotated[str, typer.Option(help='When: minute, hour, day, month, weekday, such as "0 2 * * *".')],
    timezone: Annotated[str, typer.Option(help="Whose clocks, such as Europe/Berlin.")] = "UTC",
    catch_up: Annotated[
        Literal["once", "skip"],
        typer.Option(help="Times that passed while nothing ran: one round for all of them at once, or none."),
    ] = "once",
    jitter: Annotated[float, typer.Option(help="Start up to so many seconds late, by chance.", min=0)] = 0,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Run `wiseline round` at these times, until Ctrl-C or SIGTERM.

    A round that fails is tried again twice, ten minutes apart. A stop ends a running round too; what it had
    finished is in the store, and the next one goes on from there.
    """
    from jobs.due_times import due_times
    from pipeline.storage.object_store import open_store

    settings = load_config(config, overrides=set_ or ())
    times = due_times(cron, timezone=timezone)
    command = [sys.executable, "-m", "jobs.cli", "round"]
    command += ["--config", str(config)] if config else []
    command += [word for override in set_ or () for word in ("--set", override)]
    runner = Rounds(command)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: runner.stop())
    schedule = Schedule(open_store(settings.store, probe=True), times, jitter=jitter)
    schedule.run(runner, catch_up=catch_up == "once")


class Stop:
    """An event that a signal handler may set. `threading.Event.set` takes a lock, which the `wait` that the handler
    interrupts may hold."""

    def __init__(self) -> None:
        self._is_set = False
        self._heard: SimpleQueue[None] = SimpleQueue()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._heard.put(None)

    def wait(self, seconds: float) -> bool:
        """Whether it is set, at the latest after so many seconds."""
        if not self._is_set:
            with contextlib.suppress(Empty):
                self._heard.get(timeout=seconds)
        return self._is_set


class Rounds:
    """Rounds in processes of their own: their memory is given back, and none of them ends the schedule."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None
        self.stopped = Stop()

    def run(self) -> int:
        self._process = subprocess.Popen(self._command)
        if self.stopped.is_set():  # told between the two
            self._process.terminate()
        return self._process.wait()

    def stop(self) -> None:
        self.stopped.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()


@dataclass(frozen=True)
class Schedule:
    store: "ObjectStore"
    times: "DueTimes"
    jitter: float = 0
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    def run(self, rounds: Rounds, *, catch_up: bool) -> None:
        """Until `rounds` is stopped. Nothing that goes wrong with a round or the store ends it."""
        due = self._first(catch_up=catch_up)
        while not rounds.stopped.is_set():
            starts = due + timedelta(seconds=random.uniform(0, self.jitter))
            _say(f"Next round: {due.astimezone(self.times.zone):%Y-%m-%d %H:%M %Z}")
            while not rounds.stopped.is_set() and (wait := (starts - self.now()).total_seconds()) > 0:
                rounds.stopped.wait(min(wait, LOOK_SECONDS))
            if not rounds.stopped.is_set():
                self._serve(due, rounds)
            due = self._next(due, catch_up=catch_up)

    def _first(self, *, catch_up: bool) -> datetime:
        """The last due time where it was missed. A schedule that is new to the store owes nothing from before."""
        last = self.times.until(self.now())
        if not self.store.list(NOTES):
            self._note(last, None)
        return last if catch_up and not self.store.exists(note_of(last)) else self.times.after(self.now())

    def _next(self, due: datetime, *, catch_up: bool) -> datetime:
        """After a round, or a sleep, that lasted beyond the next time: the last one that passed, or none of them."""
        last = self.times.until(self.now())
        return last if catch_up and last > due else self.times.after(self.now())

    def _serve(self, due: datetime, rounds: Rounds) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                if self.store.exists(note_of(due)):
                    _say("Another scheduler has run this round.")
                    return
                code = rounds.run()
                if rounds.stopped.is_set():
                    return  # not noted: the next start makes up for it
                if code == 0 or attempt == ATTEMPTS:
                    self._note(due, code)
                    return
                _say(f"The round ended with exit status {code}; it is tried again in {PAUSE_SECONDS:g} s.")
            except StoreError as error:
                _say(f"{error} Tried again in {PAUSE_SECONDS:g} s.")
            if rounds.stopped.wait(PAUSE_SECONDS):
                return

    def _note(self, due: datetime, code: int | None) -> None:
        note = {"due": due.isoformat(), "ended": self.now().isoformat(), "exit_status": code}
        with contextlib.suppress(AlreadyExists):  # two ran it at the same time; one of them published
            self.store.create(note_of(due), json.dumps(note).encode())


def note_of(due: datetime) -> str:
    return f"{NOTES}/{due:%Y-%m-%dT%H%M}Z.json"


def _say(sentence: str) -> None:
    typer.echo(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z  {sentence}")
