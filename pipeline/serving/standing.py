"""What stands in store and engine, told to Prometheus whether anything happens or not.

Rounds come and go; a replica is always there, so it is the one that says how old the release is and what waits. Every
replica says it: dashboards and alerts take the maximum.
"""

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from time import monotonic
from typing import get_args

import pyarrow.compute as pc

from pipeline.errors import CorruptObject, NewerSchema, NotFound, StoreError
from pipeline.logs import logger
from pipeline.metrics import METRICS, record
from pipeline.serving.answers import number
from pipeline.serving.engine import Engine
from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import OfModel, head, read_release, release_numbers, release_path
from pipeline.training.round_state import ShardState, look_at_rounds
from pipeline.training.waiting import decided, waiting

log = logger(__name__)

LOOK_SECONDS = 10.0  # as often as Ray hands metrics on
DAMAGE = (CorruptObject, NewerSchema, NotFound)  # the store answers, but not with what it should
SHARD_STATES: tuple[ShardState, ...] = get_args(ShardState)


class Standing:
    """Looks every few seconds, from a thread of its own. Never raises: a store that fails is counted and logged. One
    that takes a request and says nothing holds that thread for minutes: another one tells what needs no store."""

    def __init__(self, store: ObjectStore, engine: Engine) -> None:
        self._store, self._engine, self._log = store, engine, EditLog(store)
        self._counted: tuple[int | None, int] | None = None  # version of the log, number of the release
        self._waits_since: datetime | None = None
        self._of_model = OfModel(engine.base.fingerprint, engine.base.layer)
        self._last = 0  # release, of whatever model
        self._head = (0, datetime.now(UTC))  # number of this model's, and when it was published
        self._phases: tuple[str, dict[str, float]] = "", {}  # of which report
        self._troubled = False
        self._looked = monotonic()  # when all of the store was read last

    def start(self) -> None:
        for name, metric in METRICS.items():
            if metric.kind == "counter" and metric.reporter == "replica" and not metric.labels:
                record(name, 0)
        for act in (self.tell, self._try_to_look):
            threading.Thread(target=_again_and_again, args=(act,), name="wiseline-standing", daemon=True).start()

    def tell(self) -> None:
        """Records the gauges of a replica that need no store."""
        record("wiseline_queued_prompts", self._engine.queued)
        record("wiseline_running_answers", self._engine.running)
        record("wiseline_release", number(self._engine.release))
        record("wiseline_store_silent_seconds", monotonic() - self._looked)

    def look(self) -> None:
        """Records all the others. Raises what the store raises; where something in it is damaged, after all that is
        not."""
        damage: StoreError | None = None
        for part in (self._look_at_releases, self._look_at_log, self._look_at_rounds):
            try:
                part()
            except DAMAGE as error:
                damage = damage or error
        if damage is not None:
            raise damage
        self._looked = monotonic()

    def _try_to_look(self) -> None:
        try:
            self.look()
            self._troubled = False
        except Exception as error:
            record("wiseline_store_errors_total")
            if not self._troubled:
                log.warning("What stands in the store cannot be told: %s", error)
            self._troubled = True

    def _look_at_releases(self) -> None:
        """A head that cannot be read is the newest release all the same: replicas are behind it."""
        numbers = release_numbers(self._store)
        last = max(numbers, default=0)
        if last != self._last:
            try:
                standing = head(self._store, self._of_model)
                newest, self._last = standing.number if standing else 0, last
            except DAMAGE:
                newest = max(set(numbers) - self._of_model.others)
            if newest:
                self._head = newest, self._store.modified(release_path(newest))
        record("wiseline_head_release", self._head[0])
        if self._head[0]:
            record("wiseline_release_age_seconds", _since(self._head[1]))

    def _look_at_log(self) -> None:
        """What waits is counted when log or release have moved; how long it waits, every time."""
        release = self._engine.release
        at = (self._log.version(), number(release))
        if self._counted != at:
            newest = self._log.newest(at[0])
            standing = read_release(self._store, at[1]) if at[1] else None
            left = waiting(newest, release.entries if release else (), decided=decided(self._store, standing))
            self._counted, self._waits_since = at, pc.min(left["ingested_at"]).as_py()
            record("wiseline_edits_waiting", left.num_rows)
            record("wiseline_edits_living", pc.sum(pc.equal(newest["op"], "upsert")).as_py() or 0)
            record("wiseline_edits_failed", len(release.failed) if release else 0)
            record("wiseline_log_entries", self._log.length(at[0]))
        record("wiseline_edits_waiting_seconds", _since(self._waits_since))
        record("wiseline_quarantined_rows", self._log.quarantined())

    def _look_at_rounds(self) -> None:
        running, last = look_at_rounds(self._store, self._of_model)
        record("wiseline_round_running", running is not None)
        record("wiseline_round_silent_seconds", _since(running.news if running else None))
        states = [shard.state for shard in running.shards] if running else []
        for state in SHARD_STATES:
            record("wiseline_round_shards", states.count(state), state=state)
        if last is None:
            return
        record("wiseline_last_round_missed", last.missed)
        record("wiseline_last_round_age_seconds", _since(last.ended))
        if last.report != self._phases[0]:
            seconds = dict(json.loads(self._store.read(last.report))["seconds"])
            # A phase that this round did not have is said to have taken no time.
            self._phases = last.report, {**dict.fromkeys(self._phases[1], 0.0), **seconds}
            for phase, taken in self._phases[1].items():
                record("wiseline_last_round_phase_seconds", taken, phase=phase)


def _again_and_again(act: Callable[[], None]) -> None:
    pause = threading.Event()
    while True:
        act()
        pause.wait(LOOK_SECONDS)


def _since(moment: datetime | None) -> float:
    return 0.0 if moment is None else max(0.0, (datetime.now(UTC) - moment).total_seconds())
