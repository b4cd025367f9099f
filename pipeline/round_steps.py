"""The steps of a round: plan → train → merge → evaluate → publish.

Each leaves immutable objects named by what they were computed from, so each may be killed anywhere and taken again:
what is there is found, the rest is made, and the release has the same bytes. `pipeline/rounds.py` takes them one after
another, or each in a process of its own; what one leaves the next in the same process only saves time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.actors.cluster import check_room, connect
from pipeline.actors.results import fetch
from pipeline.actors.worker_pool import (
    Job,
    WorkerPool,
    extract_shards,
    merge_memories,
    polish_memories,
    train_shards,
)
from pipeline.config import Config
from pipeline.errors import GateFailed, OutcomeUnknown, RoundConflict, WiselineError
from pipeline.evaluation.gate import check_gate, keep_verdict
from pipeline.evaluation.measure import Measurement
from pipeline.logs import logger
from pipeline.models.base_model import Identity
from pipeline.round_diary import Diary, MemoryNews, ShardNews, describe, write_report
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import (
    ObjectRef,
    OfModel,
    Release,
    head,
    only_live_since,
    publish,
    published_as,
)
from pipeline.training.candidate import Candidate
from pipeline.training.memory import bytes_to_merge, find_memory
from pipeline.training.planning import MemoryPlan, Plan, ShardPlan
from pipeline.training.shard_files import is_trained, shard_path

log = logger(__name__)

MOST_ATTEMPTS = 20  # to publish between two live releases


@dataclass
class Round:
    """A planned round, and what its steps in this process share."""

    config: Config
    store: ObjectStore
    model: Identity
    plan: Plan
    standing: Release | None  # the model's head when the round was planned
    diary: Diary
    pool: WorkerPool
    activations: dict[str, Any] = field(default_factory=dict)  # by digest of the shard: what extraction left in Ray
    routing: Any = None  # reference to the router, once somebody fits it

    @property
    def shards(self) -> list[Job]:
        """All of them, in the order of their numbers."""
        return [(memory, shard) for memory in self.plan.memories for shard in memory.shards]

    @cached_property
    def memories(self) -> dict[str, ObjectRef | None]:
        """By digest: the memories as they will be served, as far as they are finished."""
        published = {reference.path: reference for reference in self.standing.memories} if self.standing else {}
        return {
            memory.digest: find_memory(self.store, memory, config=self.config, published=published)
            for memory in self.plan.memories
        }

    @property
    def unfinished(self) -> list[MemoryPlan]:
        return [memory for memory in self.plan.memories if self.memories[memory.digest] is None]

    @property
    def to_polish(self) -> list[ShardPlan]:
        """Polishing looks at all edits of a memory, also at those of shards that an earlier run trained."""
        polished = self.unfinished if self.config.merge.polish_steps else []
        return [shard for memory in polished for shard in memory.shards]

    def workers(self, *, most: int, whole_model: bool = True) -> list[Any]:
        if self.pool.goes_on:
            return self.pool.stage(most=most, whole_model=whole_model)
        connect(self.config.resources, logs=self.config.observe.logs)
        check_room(self.config.resources)
        with self.diary.phase("start", "workers"):
            return self.pool.stage(most=most, whole_model=whole_model)

    def forget(self) -> None:
        """All but what is in the store."""
        self.pool.keep(0)
        self.activations, self.routing = {}, None
        self.__dict__.pop("memories", None)


def untrained(round: Round) -> list[int]:
    """Numbers of the shards that are to be trained."""
    return [number for number, (_, shard) in enumerate(round.shards) if not is_trained(round.store, shard)]


def extract(round: Round, shards: Sequence[ShardPlan]) -> list[Any]:
    """Keys and states go to the store, the rest to whoever trains or polishes. Returns workers that have the model."""
    round.workers(most=len(shards))
    with round.diary.phase("extract", f"{sum(len(shard.edits) for shard in shards)} edits"):
        round.activations |= extract_shards(round.pool, shards)
    return round.pool.workers


def fit_router(round: Round, worker: Any) -> None:
    """Needs the extracted states alone, so it is fitted beside the training."""
    round.routing = worker.route.remote(round.plan, round.standing)
    if round.pool.apart:
        round.pool.keep(1)
        with round.diary.phase("route", f"a router over {len(round.plan.live_edits)} edits"):
            fetch(round.routing)


def train(round: Round, numbers: Sequence[int]) -> None:
    """The shards of these numbers."""
    jobs = [round.shards[number] for number in numbers]
    to_train = {shard.digest for _, shard in jobs}
    for index, memory in enumerate(round.plan.memories):
        for shard in memory.shards:
            known = shard.digest in to_train or shard.digest in round.diary.finished
            if not known and is_trained(round.store, shard):
                round.diary.reused.add(shard.digest)
                round.diary.observe(ShardNews(index, shard, None, reused=True))
    if not jobs:
        return
    _extract_missing(round, _trained_on(round, jobs))
    for digest in to_train:
        round.diary.losses.pop(digest, None)
    workers = round.workers(most=max(len(jobs), len(round.unfinished)), whole_model=False)
    memory_of = {shard.digest: index for index, memory in enumerate(round.plan.memories) for shard in memory.shards}
    detail = f"{len(jobs)} of {len(round.shards)} shards, {min(len(jobs), len(workers))} side by side"
    with round.diary.phase("train", detail, shards=len(jobs)):
        for step in train_shards(round.pool, jobs, round.activations):
            round.diary.trained(ShardNews(memory_of[step.shard.digest], step.shard, step.progress))


def _extract_missing(round: Round, shards: Sequence[ShardPlan]) -> None:
    if missing := [shard for shard in shards if shard.digest not in round.activations]:
        extract(round, missing)


def _trained_on(round: Round, jobs: Sequence[Job]) -> list[ShardPlan]:
    """What is trained, and siblings with whose keys it is trained and that nobody has extracted."""
    shards = {shard.digest: shard for _, shard in jobs}
    if round.config.training.sibling_penalty:
        for sibling in [sibling for memory, _ in jobs for sibling in memory.shards]:
            if not round.store.exists(shard_path(sibling.digest, "keys")):
                shards[sibling.digest] = sibling
    return list(shards.values())


def merge(round: Round) -> None:
    """Every memory that is not finished, merged and polished. Raises WiselineError where its shards are not trained."""
    unfinished = round.unfinished
    if not unfinished:
        return
    if missing := untrained(round):
        raise WiselineError(
            f"{len(missing)} of {len(round.shards)} shards of round {round.plan.round_id} are not trained yet "
            f"({', '.join(map(str, missing[:8]))}{', …' if len(missing) > 8 else ''}); run `--step train` first."
        )
    _extract_missing(round, round.to_polish)
    # The first worker may still fit the router: where there is a second one, a single memory need not wait for that.
    second = round.routing is not None and len(round.pool.workers) > 1
    round.workers(most=len(unfinished) + second, whole_model=False)
    detail = f"{len(unfinished)} of {len(round.plan.memories)} memories by {round.config.merge.method}"
    size = bytes_to_merge(round.store, unfinished, config=round.config)
    with round.diary.phase("merge", detail):
        merged = merge_memories(round.pool, unfinished)
    round.diary.merged(size)
    if round.config.merge.polish_steps:
        with round.diary.phase("polish", f"at most {round.config.merge.polish_steps} steps a memory"):
            merged = _polish(round, unfinished, merged)
    round.memories.update(zip([memory.digest for memory in unfinished], merged, strict=True))


def _polish(round: Round, memories: Sequence[MemoryPlan], merged: Sequence[ObjectRef]) -> list[ObjectRef]:
    index_of = {memory.digest: index for index, memory in enumerate(round.plan.memories)}
    polished: dict[str, ObjectRef] = {}
    round.diary.polish.clear()
    for step in polish_memories(round.pool, memories, merged, round.activations):
        index = index_of[step.memory.digest]
        if isinstance(step.news, ObjectRef):
            polished[step.memory.digest] = step.news
        else:
            round.diary.polish.setdefault(index, []).append(step.news)
            round.diary.observe(MemoryNews(index, step.news))
    return [polished[memory.digest] for memory in memories]


def evaluate(round: Round) -> tuple[Release, dict[str, Any], Measurement]:
    """The candidate with its scores, the report on it, and what was measured. Raises GateFailed, and has then kept
    report and verdict; WiselineError where a memory is not merged."""
    plan, config, diary = round.plan, round.config, round.diary
    if round.unfinished:
        raise WiselineError(
            f"{len(round.unfinished)} of {len(plan.memories)} memories of round {plan.round_id} are not merged yet; "
            "run `--step merge` first."
        )
    memories = [reference for memory in plan.memories if (reference := round.memories[memory.digest])]
    worker = round.workers(most=1)[0]
    routing = round.routing or worker.route.remote(plan, round.standing)
    parent = round.standing.number if round.standing else None
    with diary.phase("route", f"a router over {len(plan.live_edits)} edits"):
        candidate: Candidate = fetch(worker.assemble.remote(plan, memories, routing, parent))
    with diary.phase("evaluate", f"{min(len(plan.live_edits), config.round.evaluate_edits)} edits"):
        measured: Measurement = fetch(worker.measure.remote(candidate.release, plan.live_edits))
    report = describe(plan, config, round.model, diary, candidate, measured)
    try:
        check_gate(measured, config.round)
    except GateFailed as failed:
        path = write_report(round.store, plan, report | {"outcome": "gate failed", "missed": list(failed.failures)})
        failed = GateFailed(f"{failed} Report: {round.store.uri}/{path}", failed.failures)
        keep_verdict(round.store, plan.round_id, failed)
        log.info("nothing is published: %s", failed)
        raise failed from None
    return candidate.release.model_copy(update={"scores": measured.scores}), report, measured


def publish_candidate(round: Round, candidate: Release) -> Release:
    """What was published: the candidate, or with it what live edits published while the round ran. Those come every few
    seconds, so one may be first again while theirs is taken along."""
    release, model = candidate, OfModel(candidate.model_fingerprint, candidate.layer)
    for _ in range(MOST_ATTEMPTS):
        newest = head(round.store, model)
        come = newest is not None and newest.number != candidate.parent
        if come and only_live_since(round.store, candidate.parent, model):
            release = fetch(round.workers(most=1)[0].carry.remote(candidate, newest))
        try:
            return publish(round.store, release)
        except RoundConflict:
            if not only_live_since(round.store, candidate.parent, model):
                raise
        except OutcomeUnknown:
            # The store went silent: only its releases say whether the manifest landed.
            if (landed := published_as(round.store, release)) is None:
                raise
            return landed
    raise RoundConflict("Live edits kept publishing first; stop posting for a minute and run the round again.")
