"""One round: snapshot the edit log → plan shards → train → merge → polish → route → evaluate → publish.

A round is a function of (log version, config, base model). Every step leaves immutable objects named by what they were
computed from, so a round that was killed anywhere is simply run again: what is there is found, the rest is made, and
the release has the same bytes. The manifest comes last; until then the previous release stands.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from pipeline.evaluation.gate import check_gate, check_verdict, keep_verdict
from pipeline.evaluation.measure import Measurement
from pipeline.logs import about, logger
from pipeline.models.base_model import Identity, identify
from pipeline.models.encoder import wanted_encoder
from pipeline.round_diary import Diary, Event, MemoryNews, ShardNews, describe, write_report
from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.releases import (
    ObjectRef,
    Release,
    head,
    newest_of_a_round,
    only_live_since,
    publish,
    read_release,
    release_numbers,
)
from pipeline.traces import span, trace_to
from pipeline.training.candidate import Candidate
from pipeline.training.memory import bytes_to_merge, find_memory
from pipeline.training.planning import MemoryPlan, Plan, plan_round
from pipeline.training.round_state import write_plan
from pipeline.training.shard_files import is_trained
from pipeline.training.tokens import fits

log = logger(__name__)

MOST_ATTEMPTS = 20  # to publish between two live releases


@dataclass(frozen=True)
class RoundResult:
    """`release` is the published one, or the one that stands when there was nothing to do (`published` is false)."""

    release: Release
    published: bool
    report: dict[str, Any]
    report_path: str | None  # of report.html inside the store
    measured: Measurement | None = None  # of the release published now


def run_round(config: Config, *, observe: Callable[[Event], None] = lambda event: None) -> RoundResult:
    """Run one round to its end and tell `observe` how it goes.

    Raises GateFailed when the candidate misses a threshold and RoundConflict when another round published first; the
    last release then stands. Any other WiselineError leaves finished shards in the store for the next run.
    """
    trace_to(config.observe.traces)
    store = open_store(config.store, probe=True)
    model = identify(config.model)
    diary = Diary(observe)
    # The head is read before the log: whatever is published from here on makes this round stale, and it then loses.
    standing = head(store)
    parent = standing.number if standing else None
    with diary.phase("plan", "reading the edit log"):
        plan = _plan(store, config, model)
    if standing is not None and _stands(store, standing, plan):
        return RoundResult(release=standing, published=False, report={}, report_path=None)
    check_verdict(store, plan.round_id)
    write_plan(store, plan)
    connect(config.resources, logs=config.observe.logs)
    check_room(config.resources)
    with about(round=plan.round_id), span("round", round=plan.round_id), WorkerPool(config, model=model) as pool:
        memories, routing = _make_memories(store, plan, config, pool, standing, diary)
        worker = _start(pool, diary, most=1)[0]
        candidate, measured = _judge(plan, memories, routing, worker, config, parent, diary)
        report = describe(plan, config, model, diary, candidate, measured)
        release = candidate.release.model_copy(update={"scores": measured.scores})
        try:
            check_gate(measured, config.round)
        except GateFailed as failed:
            path = write_report(store, plan, report | {"outcome": "gate failed", "missed": list(failed.failures)})
            failed = GateFailed(f"{failed} Report: {store.uri}/{path}", failed.failures)
            keep_verdict(store, plan.round_id, failed)
            log.info("Nothing is published: %s", failed)
            raise failed from None
        with diary.phase("publish", f"release {release.number}"):
            release = _publish(store, release, worker)
        log.info("Release %d is published with %d edits.", release.number, release.edits)
    report |= {"outcome": "published", "release": release.number}
    path = write_report(store, plan, report)
    return RoundResult(release=release, published=True, report=report, report_path=path, measured=measured)


def _stands(store: ObjectStore, standing: Release, plan: Plan) -> bool:
    """Whether there is nothing to do. A rollback is an operator's word: only news in the log are published over it."""
    newest = newest_of_a_round(store)
    if newest is None:
        return False
    if standing.restores is None:
        # A live release keeps its round's id while its edits differ; the round is done again from what is found.
        return standing.live is None and standing.round_id == plan.round_id
    if newest.live is None:
        return newest.round_id == plan.round_id
    edits = EditLog(store)
    return edits.length(standing.log_version) == edits.length(plan.log_version)


def _plan(store: ObjectStore, config: Config, model: Identity) -> Plan:
    edits = EditLog(store)
    version = edits.version()
    if version is None:
        raise WiselineError(f"The edit log in {store.uri} is empty; run `wiseline ingest FILE` first.")
    encoder = wanted_encoder(config.router) if config.router.method == "scope" else None
    return plan_round(
        edits.history(version),
        log_version=version,
        config=config,
        fingerprint=model.fingerprint,
        layer=model.layer,
        encoder=encoder.fingerprint if encoder else "",
        fits=lambda edit: fits(edit, model.tokenizer, max_tokens=model.max_tokens),
    )


def _make_memories(
    store: ObjectStore,
    plan: Plan,
    config: Config,
    pool: WorkerPool,
    standing: Release | None,
    diary: Diary,
) -> tuple[list[ObjectRef], Any]:
    """Every memory of the plan as it will be served, in its order: found, or trained, merged and polished now. And a
    reference to the router, which needs the extracted states alone and is fitted beside the training."""
    published = {reference.path: reference for reference in standing.memories} if standing is not None else {}
    found = {memory.digest: find_memory(store, memory, config=config, published=published) for memory in plan.memories}
    unfinished = [memory for memory in plan.memories if found[memory.digest] is None]
    jobs = []
    for index, memory in enumerate(plan.memories):
        for shard in memory.shards:
            if is_trained(store, shard):
                diary.reused.add(shard.digest)
                diary.observe(ShardNews(index, shard, None, reused=True))
            else:
                jobs.append((memory, shard))
    to_train = {shard.digest for _, shard in jobs}
    # Polishing looks at all edits of a memory, also at those of shards that an earlier run trained.
    polished = {memory.digest for memory in unfinished} if config.merge.polish_steps else set()
    shards = [
        shard
        for memory in plan.memories
        for shard in memory.shards
        if memory.digest in polished or shard.digest in to_train
    ]
    workers = _start(pool, diary, most=len(shards))
    with diary.phase("extract", f"{sum(len(shard.edits) for shard in shards)} edits"):
        activations = extract_shards(workers, shards)
    routing = workers[0].route.remote(plan, standing)
    if pool.apart:
        with diary.phase("route", f"a router over {len(plan.live_edits)} edits"):
            fetch(routing)
    if unfinished:
        workers = _start(pool, diary, most=max(len(jobs), len(unfinished)), whole_model=False)
        detail = f"{len(jobs)} of {sum(len(m.shards) for m in plan.memories)} shards"
        with diary.phase("train", f"{detail}, {min(len(jobs), len(workers))} side by side", shards=len(jobs)):
            _train(plan, workers, jobs, activations, diary)
        size = bytes_to_merge(store, unfinished, config=config)
        with diary.phase("merge", f"{len(unfinished)} of {len(plan.memories)} memories by {config.merge.method}"):
            merged = merge_memories(workers, unfinished)
        diary.merged(size)
        if polished:
            with diary.phase("polish", f"at most {config.merge.polish_steps} steps a memory"):
                merged = _polish(plan, workers, unfinished, merged, activations, diary)
        found |= {memory.digest: reference for memory, reference in zip(unfinished, merged, strict=True)}
    return [reference for memory in plan.memories if (reference := found[memory.digest]) is not None], routing


def _start(pool: WorkerPool, diary: Diary, *, most: int, whole_model: bool = True) -> list[Any]:
    if pool.goes_on:
        return pool.stage(most=most, whole_model=whole_model)
    with diary.phase("start", "workers"):
        return pool.stage(most=most, whole_model=whole_model)


def _train(
    plan: Plan, workers: Sequence[Any], jobs: Sequence[Job], activations: Mapping[str, Any], diary: Diary
) -> None:
    memory_of = {shard.digest: index for index, memory in enumerate(plan.memories) for shard in memory.shards}
    for step in train_shards(workers, jobs, activations):
        diary.trained(ShardNews(memory_of[step.shard.digest], step.shard, step.progress))


def _polish(
    plan: Plan,
    workers: Sequence[Any],
    memories: Sequence[MemoryPlan],
    merged: Sequence[ObjectRef],
    activations: Mapping[str, Any],
    diary: Diary,
) -> list[ObjectRef]:
    index_of = {memory.digest: index for index, memory in enumerate(plan.memories)}
    polished: dict[str, ObjectRef] = {}
    for step in polish_memories(workers, memories, merged, activations):
        index = index_of[step.memory.digest]
        if isinstance(step.news, ObjectRef):
            polished[step.memory.digest] = step.news
        else:
            diary.polish.setdefault(index, []).append(step.news)
            diary.observe(MemoryNews(index, step.news))
    return [polished[memory.digest] for memory in memories]


def _judge(
    plan: Plan,
    memories: Sequence[ObjectRef],
    routing: Any,
    worker: Any,
    config: Config,
    parent: int | None,
    diary: Diary,
) -> tuple[Candidate, Measurement]:
    with diary.phase("route", f"a router over {len(plan.live_edits)} edits"):
        candidate: Candidate = fetch(worker.assemble.remote(plan, memories, routing, parent))
    with diary.phase("evaluate", f"{min(len(plan.live_edits), config.round.evaluate_edits)} edits"):
        return candidate, fetch(worker.measure.remote(candidate.release, plan.live_edits))


def _publish(store: ObjectStore, release: Release, worker: Any) -> Release:
    """What was published: the release, or with it what live edits published while the round ran. Those come every few
    seconds, so one may be first again while theirs is taken along."""
    candidate = release
    for _ in range(MOST_ATTEMPTS):
        newest = head(store)
        if newest is not None and newest.number != candidate.parent and only_live_since(store, candidate.parent):
            release = fetch(worker.carry.remote(candidate, newest))
        try:
            publish(store, release)
        except RoundConflict:
            if only_live_since(store, candidate.parent):
                continue
            raise
        except OutcomeUnknown:
            # The store went silent: only the head knows whether the manifest landed.
            numbers = release_numbers(store)  # live edits may have come on top of it already
            if release.number not in numbers or read_release(store, release.number) != release:
                raise
        return release
    raise RoundConflict("Live edits kept publishing first; stop posting for a minute and run the round again.")
