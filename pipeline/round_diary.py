"""The diary of a round: what happens is told to whoever watches, and kept for the report."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipeline.config import Config
from pipeline.evaluation.measure import Measurement
from pipeline.evaluation.report import render_html
from pipeline.logs import logger
from pipeline.metrics import record
from pipeline.models.base_model import Identity
from pipeline.storage.object_store import ObjectStore
from pipeline.traces import span
from pipeline.training.candidate import Candidate
from pipeline.training.fit import Progress
from pipeline.training.planning import Plan, ShardPlan

log = logger(__name__)


@dataclass(frozen=True)
class PhaseStarted:
    """plan, start (of workers), extract, train, merge, polish, route, evaluate or publish begins; `detail` says how
    much there is to do. A phase may begin again; its seconds add up."""

    name: str
    detail: str
    shards: int = 0  # how many the train phase will train


@dataclass(frozen=True)
class ShardNews:
    """A shard's progress; with `progress` None it is finished, with `reused` it was finished in an earlier run."""

    memory: int
    shard: ShardPlan
    progress: Progress | None
    reused: bool = False


@dataclass(frozen=True)
class MemoryNews:
    """How the wordings of a memory's edits hold while it is polished; step 0 is the memory as it was merged."""

    memory: int
    progress: Progress


Event = PhaseStarted | ShardNews | MemoryNews


@dataclass
class Diary:
    """What the report tells of a round, gathered on the way."""

    observe: Callable[[Event], None]
    seconds: dict[str, float] = field(default_factory=dict)
    losses: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    finished: dict[str, Progress] = field(default_factory=dict)
    reused: set[str] = field(default_factory=set)
    polish: dict[int, list[Progress]] = field(default_factory=dict)  # of the memories polished now

    @contextmanager
    def phase(self, name: str, detail: str, *, shards: int = 0) -> Iterator[None]:
        self.observe(PhaseStarted(name, detail, shards))
        log.info("%s: %s", name, detail)
        started = time.monotonic()
        try:
            with span(name):
                yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0) + time.monotonic() - started, 3)
            record("wiseline_round_phase_seconds", self.seconds[name], phase=name)

    def trained(self, news: ShardNews) -> None:
        digest, progress = news.shard.digest, news.progress
        if progress is not None:
            known = self.finished[digest].step if digest in self.finished else 0
            # A shard whose worker died begins anew.
            record("wiseline_training_steps_total", progress.step - (known if progress.step > known else 0))
            record("wiseline_shard_loss", progress.loss, memory=str(news.memory), shard=str(news.shard.index))
            self.losses.setdefault(digest, []).append((progress.step, progress.loss))
            self.finished[digest] = progress
        else:
            steps = self.finished[digest].step if digest in self.finished else 0
            log.info(
                "shard %d/%d finished after %d steps", news.memory, news.shard.index, steps, extra={"shard": digest}
            )
        self.observe(news)

    def merged(self, size: int) -> None:
        """Bytes of deltas, in the merge phase that has just ended."""
        if size:
            record("wiseline_merge_bytes_total", size)
            record("wiseline_merge_seconds_total", self.seconds["merge"])


def describe(
    plan: Plan,
    config: Config,
    model: Identity,
    diary: Diary,
    candidate: Candidate,
    measured: Measurement,
) -> dict[str, Any]:
    """What report.json holds; `pipeline/evaluation/report.py` draws it."""
    shards = [
        {
            "memory": index,
            "shard": shard.index,
            "digest": shard.digest,
            "edits": len(shard.edits),
            "reused": shard.digest in diary.reused,
            "steps": progress.step if progress else None,
            "holding": progress.holding if progress else None,
            "wordings": progress.wordings if progress else None,
            "loss": diary.losses.get(shard.digest, []),
        }
        for index, memory in enumerate(plan.memories)
        for shard in memory.shards
        for progress in [diary.finished.get(shard.digest)]
    ]
    return {
        "round_id": plan.round_id,
        "log_version": plan.log_version,
        "parent": candidate.release.parent,
        "model": {"path": config.model.path, "fingerprint": model.fingerprint, "layer": model.layer},
        "config": config.model_dump(mode="json"),
        "edits": len(plan.live_edits),
        "too_long": list(plan.too_long),
        "memories": len(plan.memories),
        "shards": shards,
        "polish": [
            {
                "memory": index,
                "steps": curve[-1].step,
                "wordings": curve[-1].wordings,
                "held_merged": curve[0].holding,
                "held_polished": curve[-1].holding,
            }
            for index, curve in sorted(diary.polish.items())
        ],
        "seconds": dict(diary.seconds),
        "routing": {"threshold": candidate.threshold, **asdict(candidate.calibration)},
        "measured": asdict(measured),
        "thresholds": {
            "reliability": config.round.min_reliability,
            "generalization": config.round.min_generalization,
            "locality": config.round.min_locality,
        },
    }


def write_report(store: ObjectStore, plan: Plan, report: dict[str, Any]) -> str:
    """Report of this attempt; a round that is run again writes another beside it. Returns the page's path."""
    folder = f"rounds/{plan.round_id}/{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
    store.put(f"{folder}/report.json", json.dumps(report, ensure_ascii=False, indent=1).encode())
    store.put(f"{folder}/report.html", render_html(report).encode())
    return f"{folder}/report.html"
