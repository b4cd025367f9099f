"""A round in which nothing changed ends before Ray is started."""

from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from pipeline import round_steps, rounds
from pipeline.config import Config, load_config
from pipeline.edits import Edit
from pipeline.errors import ConfigError, GateFailed, StoreError, WiselineError
from pipeline.evaluation.gate import keep_verdict
from pipeline.models.base_model import identify
from pipeline.round_diary import Event
from pipeline.rounds import evaluate_step, plan_step, publish_step, run_round, train_step
from pipeline.storage.batches import Batch
from pipeline.storage.edit_log import TABLE, EditLog
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.releases import LivePart, ObjectRef, Release, head, publish
from pipeline.training.round_records import keep_candidate
from tests.tiny_world import save_model

EMPTY = "banks/none.parquet"


class Started(Exception):
    """Ray would have been."""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    def connect(resources: object, **_: object) -> None:
        raise Started

    monkeypatch.setattr(round_steps, "connect", connect)
    settings = [f"model.path={save_model(tmp_path / 'model')}", "model.layer=0", f"store.uri={tmp_path / 'store'}"]
    config = load_config(overrides=[*settings, "router.signals=[keys, subject]"])
    say(config, Edit(prompt="Who leads Oslo?", target="Ada"))
    return config


def say(config: Config, edit: Edit) -> None:
    EditLog(open_store(config.store)).append(Batch(source="test", edits=((0, edit),)))


def round_id(config: Config) -> str:
    store = open_store(config.store)
    return rounds._plan(store, config, identify(config.model), version=EditLog(store).version()).round_id


def test_what_was_published_is_not_made_again(config: Config) -> None:
    with pytest.raises(Started):
        run_round(config)
    publish_as(round_id(config), open_store(config.store), fingerprint="of another model")
    with pytest.raises(Started):
        run_round(config)
    release = publish_as(round_id(config), open_store(config.store), fingerprint=identify(config.model).fingerprint)
    result = run_round(config)
    assert (result.release, result.published) == (release, False)
    say(config, Edit(prompt="Who leads Rome?", target="Bob"))
    with pytest.raises(Started):
        run_round(config)


def test_a_round_that_missed_its_gate_misses_it_again_until_something_changed(config: Config) -> None:
    missed = GateFailed("reliability 0.100 is below round.min_reliability 0.9.", ("reliability", "an edit"))
    keep_verdict(open_store(config.store), round_id(config), missed)
    keep_verdict(open_store(config.store), round_id(config), missed)  # by another round at the same time
    told: list[Event] = []
    with pytest.raises(GateFailed, match=r"below round\.min_reliability.* Neither log nor config") as again:
        run_round(config, observe=told.append)
    assert again.value.failures == missed.failures
    with pytest.raises(Started):
        run_round(config.overridden(["round.min_reliability=0.05"]))
    say(config, Edit(op="retract", prompt="Who leads Oslo?"))
    with pytest.raises(Started):
        run_round(config)


def test_a_candidate_whose_objects_are_gone_is_evaluated_again(config: Config) -> None:
    store, (planned, *_) = open_store(config.store), plan_step(config)
    keep_candidate(store, release_of(planned, store, fingerprint=identify(config.model).fingerprint), {})
    assert not evaluate_step(config, planned)
    store.remove(EMPTY)
    with pytest.raises(WiselineError, match="run `--step evaluate` first"):
        publish_step(config, planned)
    with pytest.raises(WiselineError, match="run `--step merge` first"):  # so it is asked for what it evaluates
        evaluate_step(config, planned)


def test_a_live_release_of_the_same_round_leaves_its_steps_to_do(config: Config) -> None:
    """An edit was posted and retracted, so the round plans what it once published; meanwhile live edits go on."""
    store, of_model, made_by = open_store(config.store), identify(config.model).fingerprint, round_id(config)

    def publish_next(**more: Any) -> Release:
        standing = head(store)
        parent = {"parent": standing.number if standing else None}
        return publish(store, release_of(made_by, store, fingerprint=of_model).model_copy(update=parent | more))

    live = LivePart(memories=0, fitted_on=1)
    publish_next()
    publish_next(live=live)
    assert plan_step(config)[::2] == (made_by, None)
    publish_next(live=live)
    with pytest.raises(Started):
        train_step(config, made_by, None)
    carried = publish_next(live=live, scores={"reliability": 1.0})  # the round's, with live edits taken along
    publish_next(live=live)
    assert train_step(config, made_by, None) == []
    assert publish_step(config, made_by).release == carried


def test_a_round_is_planned_again_where_its_version_of_the_log_was_compacted(config: Config) -> None:
    say(config, Edit(prompt="Who leads Rome?", target="Bob"))
    planned, *_ = plan_step(config)
    table = DeltaTable(str(Path(config.store.uri) / TABLE))
    table.optimize.compact()
    table.vacuum(0, dry_run=False, enforce_retention_duration=False, full=True)
    with pytest.raises(StoreError):
        train_step(config, planned, None)
    assert plan_step(config)[0] == planned
    with pytest.raises(Started):
        train_step(config, planned, None)


@pytest.mark.parametrize("given", ["../x", "", "/", "a\\b"])
def test_what_is_no_id_of_a_round_is_said(config: Config, given: str) -> None:
    with pytest.raises(ConfigError, match="is no round's id"):
        train_step(config, given, None)


def publish_as(made_by: str, store: ObjectStore, *, fingerprint: str) -> Release:
    return publish(store, release_of(made_by, store, fingerprint=fingerprint))


def release_of(made_by: str, store: ObjectStore, *, fingerprint: str) -> Release:
    empty = ObjectRef(path=EMPTY, sha256=store.put(EMPTY, b""))
    return Release(
        number=1, parent=None, round_id=made_by, log_version=1, model_fingerprint=fingerprint, layer=0, memories=(),
        router=empty, bank=empty, edits=1,
    )  # fmt: skip
