"""One round: snapshot the edit log → plan shards → train → merge → polish → route → evaluate → publish.

A round is a function of (log version, config, base model). Its steps are in `pipeline/round_steps.py`; here they are
taken one after another, or one alone, as a workflow engine does. The manifest comes last; until then the previous
release stands.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.actors.worker_pool import WorkerPool
from pipeline.config import Config
from pipeline.errors import ConfigError, WiselineError, WorkersLost
from pipeline.evaluation.gate import check_verdict
from pipeline.evaluation.measure import Measurement
from pipeline.logs import about, logger
from pipeline.models.base_model import Identity, identify
from pipeline.models.encoder import wanted_encoder
from pipeline.round_diary import Diary, Event, write_report
from pipeline.round_steps import Round, evaluate, extract, fit_router, merge, publish_candidate, train, untrained
from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.releases import OfModel, Release, head, newest_first, newest_of_a_round, next_number, read_release
from pipeline.traces import span, trace_to
from pipeline.training.planning import Plan, plan_round
from pipeline.training.round_records import Beginning, find_candidate, keep_candidate, note_beginning, read_beginning
from pipeline.training.round_state import write_plan
from pipeline.training.tokens import fits

log = logger(__name__)

Observe = Callable[[Event], None]


@dataclass(frozen=True)
class RoundResult:
    """`release` is the published one, or the one that stands when there was nothing to do (`published` is false)."""

    release: Release
    published: bool
    report: dict[str, Any]
    report_path: str | None  # of report.html inside the store
    measured: Measurement | None = None  # of the release published now


def run_round(config: Config, *, observe: Observe = lambda event: None) -> RoundResult:
    """Run one round to its end and tell `observe` how it goes.

    Raises GateFailed when the candidate misses a threshold and RoundConflict when another round published first; the
    last release then stands. Any other WiselineError leaves finished shards in the store for the next run.
    """
    with _planned(config, observe) as round:
        if (done := _stands(round)) is not None:
            return RoundResult(release=done, published=False, report={}, report_path=None)
        check_verdict(round.store, round.plan.round_id)
        write_plan(round.store, round.plan)
        release, report, measured = _evaluated(round)
        return _published(round, release, report, measured)


def _evaluated(round: Round) -> tuple[Release, dict[str, Any], Measurement]:
    """Where a node took workers with it, or what they held, the round goes on from the store with those that are there
    then."""
    restarts = round.config.resources.max_restarts
    while True:
        try:
            numbers = untrained(round)
            needed = {shard.digest for shard in [*(round.shards[n][1] for n in numbers), *round.to_polish]}
            workers = extract(round, [shard for _, shard in round.shards if shard.digest in needed])
            fit_router(round, workers[0])
            train(round, numbers)
            merge(round)
            return evaluate(round)
        except WorkersLost:
            if restarts == 0:
                raise
            restarts -= 1
            round.forget()


def plan_step(config: Config, *, observe: Observe = lambda event: None) -> tuple[str, list[int], Release | None]:
    """The round's id, the numbers of the shards that are to be trained, and the release that stands where there is
    nothing to do. Raises GateFailed where this very round missed its gate before."""
    with _planned(config, observe) as round:
        plan, done = round.plan, _stands(round)
        if done is None:
            check_verdict(round.store, plan.round_id)
            write_plan(round.store, plan)
        parent = round.standing.number if round.standing else None
        note_beginning(round.store, plan.round_id, Beginning(log_version=plan.log_version, parent=parent))
        return plan.round_id, [] if done else untrained(round), done


def train_step(
    config: Config, round_id: str, shards: Sequence[int] | None, *, observe: Observe = lambda event: None
) -> list[int]:
    """The numbers of the shards trained now, of these or of all. Other processes may train others meanwhile."""
    with _planned(config, observe, round_id=round_id) as round:
        there = len(round.shards)
        if wrong := [number for number in shards or () if not 0 <= number < there]:
            raise ConfigError(f"Round {round_id} has {there} shards, numbered from 0; there is no shard {wrong[0]}.")
        numbers = [] if _is_done(round) else [n for n in untrained(round) if shards is None or n in shards]
        train(round, numbers)
        return numbers


def merge_step(config: Config, round_id: str, *, observe: Observe = lambda event: None) -> int:
    """How many memories were merged and polished now. Raises WiselineError where shards of theirs are not trained."""
    with _planned(config, observe, round_id=round_id) as round:
        count = 0 if _is_done(round) else len(round.unfinished)
        if count:
            merge(round)
        return count


def evaluate_step(config: Config, round_id: str, *, observe: Observe = lambda event: None) -> bool:
    """Whether it was evaluated now. Raises GateFailed where it missed its gate, and WiselineError where it is not
    merged."""
    with _planned(config, observe, round_id=round_id) as round:
        if _is_done(round) or find_candidate(round.store, round_id):
            return False
        check_verdict(round.store, round_id)
        round.diary.reused |= {shard.digest for _, shard in round.shards}  # trained by other processes
        release, report, _ = evaluate(round)
        keep_candidate(round.store, release, report)
        return True


def publish_step(config: Config, round_id: str, *, observe: Observe = lambda event: None) -> RoundResult:
    """Raises RoundConflict like a whole round, and WiselineError where nothing is evaluated."""
    with _planned(config, observe, round_id=round_id) as round:
        if (done := _is_done(round)) is not None:
            return RoundResult(release=done, published=False, report={}, report_path=None)
        found = find_candidate(round.store, round_id)
        if found is None:
            raise WiselineError(f"Round {round_id} is not evaluated yet; run `--step evaluate` first.")
        parent = round.standing.number if round.standing else None
        release = found[0].model_copy(update={"parent": parent, "log_version": round.plan.log_version})
        return _published(round, release, found[1] | {"parent": parent}, None)


@contextmanager
def _planned(config: Config, observe: Observe, *, round_id: str | None = None) -> Iterator[Round]:
    """A round of now; or that of this id, as it was planned."""
    trace_to(config.observe.traces)
    store = open_store(config.store, probe=True)
    model = identify(config.model)
    diary = Diary(observe)
    with diary.phase("plan", "reading the edit log"):
        if round_id is None:
            # The head is read before the log: whatever is published from here on makes this round stale, and it loses.
            standing = head(store, OfModel(model.fingerprint, model.layer))
            plan = _plan(store, config, model, version=EditLog(store).version())
        else:
            began = read_beginning(store, round_id)
            standing = None if began.parent is None else read_release(store, began.parent)
            plan = _plan(store, config, model, version=began.log_version)
    if round_id not in (None, plan.round_id):
        raise ConfigError(f"Round {round_id} was planned with another config or base model; give all steps the same.")
    with about(round=plan.round_id), span("round", round=plan.round_id), WorkerPool(config, model=model) as pool:
        yield Round(config, store, model, plan, standing, diary, pool)


def _plan(store: ObjectStore, config: Config, model: Identity, *, version: int | None) -> Plan:
    if version is None:
        raise WiselineError(f"The edit log in {store.uri} is empty; run `wiseline ingest FILE` first.")
    encoder = wanted_encoder(config.router) if config.router.method == "scope" else None
    return plan_round(
        EditLog(store).history(version),
        log_version=version,
        config=config,
        fingerprint=model.fingerprint,
        layer=model.layer,
        encoder=encoder.fingerprint if encoder else "",
        fits=lambda edit: fits(edit, model.tokenizer, max_tokens=model.max_tokens),
    )


def _stands(round: Round) -> Release | None:
    """The standing release, where there is nothing to do. A rollback is an operator's word: only news in the log are
    published over it."""
    store, standing, plan = round.store, round.standing, round.plan
    newest = newest_of_a_round(store, OfModel(round.model.fingerprint, round.model.layer))
    if standing is None or newest is None:
        return None
    if standing.restores is None:
        # A live release keeps its round's id while its edits differ; the round is done again from what is found.
        return standing if standing.live is None and standing.round_id == plan.round_id else None
    if newest.live is None:
        return standing if newest.round_id == plan.round_id else None
    edits = EditLog(store)
    return standing if edits.length(standing.log_version) == edits.length(plan.log_version) else None


def _is_done(round: Round) -> Release | None:
    """What the round published since it was planned, or what stood then and left nothing to do."""
    model, after = OfModel(round.model.fingerprint, round.model.layer), round.standing.number if round.standing else 0
    for release in newest_first(round.store, model, after=after):
        # A live release keeps the id of the round it adds to, which may be this one's; what a round made has scores.
        made_by_round = release.restores is None and (release.live is None or bool(release.scores))
        if made_by_round and release.round_id == round.plan.round_id:
            return release
    return _stands(round)


def _published(round: Round, candidate: Release, report: dict[str, Any], measured: Measurement | None) -> RoundResult:
    with round.diary.phase("publish", f"release {next_number(round.store)}"):
        release = publish_candidate(round, candidate)
    log.info("release %d is published with %d edits", release.number, release.edits)
    report |= {"outcome": "published", "release": release.number}
    path = write_report(round.store, round.plan, report)
    return RoundResult(release=release, published=True, report=report, report_path=path, measured=measured)
