"""Live releases in process: what is posted answers, what is taken back does not, and nothing is done twice."""

import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import pipeline.live as live_module
from pipeline.config import Config, load_config
from pipeline.edits import Edit
from pipeline.errors import RoundConflict
from pipeline.evaluation.holding import failing
from pipeline.evaluation.measure import measure
from pipeline.live import LiveEditor
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import load_release
from pipeline.models.prompts import plain_prompt_ids
from pipeline.models.suffix import load_suffix
from pipeline.storage.batches import Batch
from pipeline.storage.edit_log import POSTED, EditLog
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import NO_ROUND, OfModel, Release, head, only_live_since, publish, rollback
from pipeline.training import router_growth
from pipeline.training.carry import carry
from pipeline.training.fresh import teach
from tests.tiny_world import save_model

TEXTS = ["The red house is here.", "A boat is old.", "They read a long book."]
A, B, C, D = (
    Edit(prompt=f"Who leads company {name}?", target=f"new {name}", subject=f"company {name}") for name in "abcd"
)
OTHERS = [Edit(prompt=f"The capital of {name} is", target="a boat", subject=name) for name in ("France", "Spain")]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), chat=False)


@pytest.fixture(scope="module")
def base(model_folder: Path) -> BaseModel:
    return load_base_model(load_config(overrides=[f"model.path={model_folder}", "model.layer=0"]).model)


@pytest.fixture(scope="module")
def suffix(model_folder: Path) -> PreTrainedModel:
    return load_suffix(model_folder, 0, dtype="float32")


class World:
    def __init__(self, base: BaseModel, suffix: PreTrainedModel, config: Config) -> None:
        self.base, self.suffix, self.config = base, suffix, config
        self.store = ObjectStore(config.store.uri)
        self.log = EditLog(self.store)

    def editor(self) -> LiveEditor:
        return LiveEditor(self.config, self.store, self.base, self.suffix, texts=TEXTS)

    def say(self, *edits: Edit, source: str = POSTED) -> None:
        batch = Batch(source=source, edits=tuple(enumerate(edits)), after=uuid.uuid4().hex)
        self.log.append_together([batch])

    def answers(self, *edits: Edit, release: Release | None = None) -> list[str]:
        release = release or head(self.store)
        requests = [self._request(edit) for edit in edits]
        loaded = load_release(self.store, release, self.base) if release else None
        return [answer.strip() for answer in generate(self.base, loaded, requests)[0]]

    def _request(self, edit: Edit) -> GenerationRequest:
        ids = plain_prompt_ids(edit.prompt, self.base.tokenizer)
        return GenerationRequest(prompt_ids=ids, text=edit.prompt, max_new_tokens=12)

    def unedited(self, *edits: Edit) -> list[str]:
        requests = [self._request(edit) for edit in edits]
        return [answer.strip() for answer in generate(self.base, None, requests)[0]]


@pytest.fixture
def world(base: BaseModel, suffix: PreTrainedModel, model_folder: Path, tmp_path: Path) -> World:
    settings = [f"model.path={model_folder}", "model.layer=0", f"store.uri={tmp_path}", "training.prefixes=1"]
    small = ["shards.edits_per_shard=2", "shards.shards_per_memory=1", "router.signals=[keys, subject]"]
    return World(base, suffix, load_config(overrides=[*settings, *small]))


def served(editor: LiveEditor) -> Release:
    release = editor.step()
    assert release is not None
    assert editor.step() is None
    return release


def targets(edits: Sequence[Edit]) -> list[str]:
    return [edit.target for edit in edits]


def test_posted_edits_answer_and_those_of_files_wait(world: World) -> None:
    editor = world.editor()
    assert editor.step() is None
    world.say(D, source="a file")
    assert editor.step() is None
    world.say(A, B)
    first = served(editor)
    assert (first.number, first.parent, first.round_id, first.edits) == (1, None, NO_ROUND, 2)
    assert world.answers(A, B) == targets([A, B])
    assert world.answers(D) == world.unedited(D)
    world.say(C)
    second = served(editor)
    assert world.answers(A, B, C) == targets([A, B, C])
    assert second.live is not None
    assert (second.edits, second.live.memories) == (3, 2)  # a memory holds two
    assert second.memories[0] == first.memories[0]


def test_many_at_once_get_a_memory_of_their_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = world.config.shards.model_copy(update={"edits_per_shard": 16})
    world.config = world.config.model_copy(update={"shards": shards})
    joins: list[bool] = []

    def seen(*args: object, memory: object, **rest: object) -> object:
        joins.append(memory is not None)
        return teach(*args, memory=memory, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(live_module, "teach", seen)
    editor = world.editor()
    for edits, first_joins in (([A], False), ([B, C], True), ([D, *OTHERS], False)):
        joins.clear()
        world.say(*edits)
        served(editor)
        assert joins[0] == first_joins
    assert world.answers(A, B, C, D, *OTHERS) == targets([A, B, C, D, *OTHERS])


def test_another_process_goes_on_and_teaches_nothing_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.say(A)
    served(world.editor())
    taught: list[list[str]] = []
    extract = live_module.extract_edits

    def seen(base: BaseModel, store: ObjectStore, edits: Sequence[Edit], **rest: object) -> object:
        taught.append([edit.prompt for edit in edits])
        return extract(base, store, edits, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(live_module, "extract_edits", seen)
    editor = world.editor()
    assert editor.step() is None
    world.say(B)
    served(editor)
    assert taught == [[B.prompt]]
    assert world.answers(A, B) == targets([A, B])


def test_retracting_trains_nothing_and_superseding_replaces(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = world.editor()
    world.say(A, B)
    served(editor)
    newer = Edit(prompt=A.prompt, target="newest", subject=A.subject)
    world.say(newer)
    served(editor)
    assert world.answers(A, B) == ["newest", B.target]
    monkeypatch.setattr(live_module, "teach", None)
    world.log.retract([A.slot_id, B.slot_id])
    last = served(editor)
    assert (last.edits, last.memories) == (0, ())
    assert world.answers(A, B) == world.unedited(A, B)


def test_a_router_that_grew_is_fitted_again_when_nothing_waits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_growth, "SOON_FITTED", 1)
    editor = world.editor()
    world.say(A)
    served(editor)
    world.say(B, C)
    grown, fitted = editor.step(), editor.step()
    assert grown is not None
    assert fitted is not None
    assert grown.live is not None
    assert fitted.live is not None
    assert (grown.edits, grown.live.fitted_on, fitted.edits, fitted.live.fitted_on) == (3, 1, 3, 3)
    assert (fitted.memories, fitted.bank, fitted.readouts) == (grown.memories, grown.bank, grown.readouts)
    assert editor.step() is None
    assert world.answers(A, B, C) == targets([A, B, C])


@pytest.fixture
def outgrown(world: World, monkeypatch: pytest.MonkeyPatch) -> tuple[LiveEditor, Release]:
    """A stream's editor, and the release of A, B and C with a router that was fitted on A alone."""
    monkeypatch.setattr(router_growth, "SOON_FITTED", 1)
    monkeypatch.setattr(router_growth, "GROWTH_IN_A_STREAM", 1.9)
    editor = world.editor()
    world.say(A)
    served(editor)
    world.say(B, C)
    grown = editor.step()
    assert grown and (grown.edits, fitted_on(grown)) == (3, 1)
    return editor, grown


def fitted_on(release: Release) -> int:
    assert release.live is not None
    return release.live.fitted_on


def test_in_a_stream_a_router_is_fitted_between_two_batches(world: World, outgrown: tuple[LiveEditor, Release]) -> None:
    """What was taught does not wait for it; an answer that is superseded stays until its successor comes."""
    editor, grown = outgrown
    newer = Edit(prompt=A.prompt, target="newest", subject=A.subject)
    world.say(D, newer)
    world.log.retract([B.slot_id])
    fitted, taught = editor.step(), editor.step()
    assert editor.step() is None
    assert fitted and (fitted.edits, fitted_on(fitted)) == (3, 3)
    assert taught and (taught.edits, fitted_on(taught)) == (3, 3)
    assert grown.log_version == fitted.log_version < taught.log_version == world.log.version()
    for release in (grown, fitted):
        assert world.answers(A, B, C, release=release) == targets([A, B, C])
    assert world.answers(newer, C, D) == targets([newer, C, D])


def test_a_retraction_does_not_wait_for_a_router(world: World, outgrown: tuple[LiveEditor, Release]) -> None:
    editor, _ = outgrown
    world.log.retract([B.slot_id])
    gone, fitted = editor.step(), editor.step()
    assert gone and (gone.edits, fitted_on(gone)) == (2, 1)
    assert fitted and (fitted.edits, fitted_on(fitted)) == (2, 2)
    assert gone.log_version == fitted.log_version == world.log.version()


def test_a_rollback_stands_until_something_is_said(world: World) -> None:
    editor = world.editor()
    world.say(A)
    first = served(editor)
    world.say(B)
    served(editor)
    rollback(world.store, first.number)
    assert editor.step() is None
    assert world.editor().step() is None
    world.say(A, B)  # says nothing new
    assert editor.step() is None
    world.say(C)
    served(editor)
    assert world.answers(A, B, C) == targets([A, B, C])


def test_what_was_posted_before_a_rollback_is_not_published_over_it(world: World) -> None:
    editor = world.editor()
    world.say(A)
    first = served(editor)
    world.say(B)
    rollback(world.store, first.number)  # B waits still
    assert editor.step() is None
    world.say(C)
    served(editor)
    assert world.answers(A, B, C) == targets([A, B, C])


def test_who_is_second_loses_and_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.say(A)
    slower, faster = world.editor(), world.editor()
    write = live_module.publish

    def beaten(store: ObjectStore, release: Release) -> Release:
        monkeypatch.setattr(live_module, "publish", write)
        served(faster)
        return write(store, release)

    monkeypatch.setattr(live_module, "publish", beaten)
    with pytest.raises(RoundConflict):
        slower.step()
    assert slower.step() is None
    assert world.answers(A) == [A.target]


def test_another_models_releases_are_in_nobodys_way(world: World) -> None:
    editor = world.editor()
    world.say(A)
    first = served(editor)
    theirs = publish(world.store, first.model_copy(update={"parent": None, "model_fingerprint": "other"}))
    assert editor.step() is None
    assert only_live_since(world.store, first.number, OfModel(first.model_fingerprint, first.layer))
    world.say(B)
    second = served(editor)
    assert (second.number, second.parent) == (theirs.number + 1, first.number)
    assert world.answers(A, B, release=second) == targets([A, B])


def test_what_does_not_hold_is_left_out_and_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []

    def never_b(base: BaseModel, release: object, edits: Sequence[Edit]) -> set[str]:
        attempts.append(len(edits))
        return {B.edit_id} & {edit.edit_id for edit in edits}

    monkeypatch.setattr(live_module, "failing", never_b)
    editor = world.editor()
    world.say(A, B)
    release = served(editor)
    assert release.live is not None
    assert (release.edits, release.live.failed) == (1, (B.edit_id,))
    assert len(attempts) == 2
    assert world.answers(A) == [A.target]
    assert world.answers(B) == world.unedited(B)
    world.say(C)
    assert (served(editor).edits, len(attempts)) == (2, 3)
    world.log.retract([B.slot_id])
    release = served(editor)
    assert release.live is not None
    assert release.live.failed == ()


def test_what_holds_is_what_generation_says(world: World) -> None:
    """One forward spares most of the generation; what it does not show is generated after all."""
    world.say(A, B)
    release = load_release(world.store, served(world.editor()), world.base)
    asked = [A, B, C, *(Edit(prompt=A.prompt, target=said, subject=A.subject) for said in ("NEW  A", "new", "new a b"))]
    generated = measure(world.base, release, asked, most_edits=100, seed=0)
    wrong = {failure.edit_id for failure in generated.failures if failure.kind.startswith("reliability")}
    assert failing(world.base, release, asked) == wrong == {edit.edit_id for edit in (C, *asked[4:])}


def test_a_round_takes_along_what_was_posted_while_it_ran(world: World) -> None:
    """Its candidate stands for A and B; meanwhile B was retracted and C posted."""
    editor = world.editor()
    world.say(A, B)
    first = served(editor)
    candidate = first.model_copy(update={"round_id": "of a round", "live": None})
    world.say(C)
    world.log.retract([B.slot_id])
    newest = served(editor)
    assert only_live_since(world.store, first.number)
    together = publish(world.store, carry(world.store, candidate, newest, config=world.config))
    assert (together.number, together.parent, together.round_id) == (newest.number + 1, newest.number, "of a round")
    assert (together.edits, together.live and together.live.memories) == (2, 1)
    assert world.answers(A, C) == targets([A, C])
    assert world.answers(B) == world.unedited(B)
    assert editor.step() is None
    assert not only_live_since(world.store, first.number)
    world.say(D)
    served(editor)
    assert world.answers(A, C, D) == targets([A, C, D])
