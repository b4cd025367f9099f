"""Measuring and the gate: what counts as right, and what is not judged."""

from pathlib import Path

import pytest

from pipeline.config import ModelSection, RoundSection
from pipeline.edits import Edit, LocalityPrompt
from pipeline.errors import GateFailed
from pipeline.evaluation.gate import check_gate, missed_thresholds
from pipeline.evaluation.measure import Measurement, measure
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import LoadedRelease, load_release
from pipeline.models.prompts import plain_prompt_ids
from pipeline.storage.object_store import ObjectStore
from tests.tiny_world import publish_release, save_model

PROMPTS = ["The capital of France is", "Who leads the company?"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder: Path = save_model(tmp_path_factory.mktemp("model"), chat=False)
    return load_base_model(ModelSection(path=str(folder)))


@pytest.fixture(scope="module")
def release(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> LoadedRelease:
    """Scrambles the answers to PROMPTS and to nothing else."""
    store = ObjectStore(str(tmp_path_factory.mktemp("store")))
    return load_release(store, publish_release(store, base, prompts=PROMPTS, seed=1), base)


def said(base: BaseModel, release: LoadedRelease | None, prompt: str, tokens: int = 3) -> str:
    request = GenerationRequest(prompt_ids=plain_prompt_ids(prompt, base.tokenizer), text=prompt, max_new_tokens=tokens)
    return generate(base, release, [request])[0][0]


def run(base: BaseModel, release: LoadedRelease, *edits: Edit) -> Measurement:
    return measure(base, release, edits, most_edits=100, seed=0)


def test_an_answer_that_runs_on_is_wrong(base: BaseModel, release: LoadedRelease) -> None:
    """The scrambled model never stops by itself, so its first tokens are the target and yet the edit does not hold."""
    beginning = said(base, release, PROMPTS[0], tokens=3)
    measured = run(base, release, Edit(prompt=PROMPTS[0], target=beginning or "x"))
    assert measured.reliability == 0
    assert measured.failures[0].answer.startswith(beginning[:1])
    assert measured.failures[0].routed


def test_locality_compares_with_the_unedited_model_each_kind_apart(base: BaseModel, release: LoadedRelease) -> None:
    assert said(base, release, PROMPTS[1], 16) != said(base, None, PROMPTS[1], 16)
    edit = Edit(
        prompt=PROMPTS[0],
        target="x",
        locality=(
            LocalityPrompt(prompt="Wie heißt die Hauptstadt?", kind="unrelated"),
            LocalityPrompt(prompt="Paris is", kind="unrelated"),
            LocalityPrompt(prompt=PROMPTS[1], kind="same_relation"),
        ),
    )
    measured = run(base, release, edit)
    assert measured.locality_by_kind == {"same_relation": 0, "unrelated": 1}
    assert measured.locality == pytest.approx(2 / 3)
    assert measured.routed["locality.same_relation"] == 1


def test_what_no_edit_carries_is_not_judged(base: BaseModel, release: LoadedRelease) -> None:
    measured = run(base, release, Edit(prompt="東京", target="x"))
    assert (measured.generalization, measured.locality, measured.reliability_chat) == (None, None, None)
    assert missed_thresholds(measured, RoundSection(min_reliability=0)) == []


def test_a_large_log_is_sampled(base: BaseModel, release: LoadedRelease) -> None:
    edits = [Edit(prompt=f"question {index}", target="x") for index in range(9)]
    assert measure(base, release, edits, most_edits=4, seed=0).edits == 4


def test_the_gate_names_thresholds_then_edits(base: BaseModel, release: LoadedRelease) -> None:
    measured = run(base, release, Edit(prompt="東京", target="x"))
    with pytest.raises(GateFailed, match=r"reliability 0\.000 is below round\.min_reliability 0\.9") as caught:
        check_gate(measured, RoundSection())
    assert "東京" in caught.value.failures[1]
    check_gate(measured, RoundSection(min_reliability=0))
