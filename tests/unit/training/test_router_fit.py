"""The fitted router: reaches its edits, keeps off what it was calibrated against, and never looks at held-out text."""

import torch

from pipeline.config import RouterSection
from pipeline.edits import Edit
from pipeline.models.base_model import BaseModel
from pipeline.models.loaded_release import decode_router, encode_router
from pipeline.models.mentions import SubjectTable
from pipeline.models.prompts import plain_prompt_ids
from pipeline.storage.bank import BankEntry
from pipeline.training.activations import extract
from pipeline.training.router_fit import fit_router
from pipeline.training.tokens import wordings

UNRELATED = [f"The {colour} {thing} is here" for colour in ("red", "old", "new") for thing in ("house", "tree", "boat")]
EDITS = [
    Edit(prompt=template.format(name), target="x", subject=name)
    for name in ("Ada", "Bob", "Cleo", "Dan")
    for template in ("Who leads {}?", "Where is {} now")
]


def fitted(base: BaseModel, edits: list[Edit], section: RouterSection | None = None):  # type: ignore[no-untyped-def]
    entries, states = [], []
    for edit in edits:
        asked = wordings(edit, base.tokenizer, prefixes=["Paris is."], max_tokens=256)
        entries.append(BankEntry(edit.edit_id, edit.prompt, edit.target, edit.subject, memory=0))
        states.append(extract(base, asked).states_ND)
    router, calibration = fit_router(
        base, entries, states, unrelated=UNRELATED, section=section or RouterSection(), seed=0
    )
    return router, calibration, SubjectTable([entry.subject for entry in entries])


def best(base: BaseModel, router, subjects: SubjectTable, prompt: str) -> tuple[float, int]:  # type: ignore[no-untyped-def]
    states = extract(base, wordings(Edit(prompt=prompt, target="x"), base.tokenizer, prefixes=[], max_tokens=256)[:1])
    scores = router.scores(router.signals(states.states_ND, subjects.mentions([prompt])))[0]
    return float(scores.max()), int(scores.argmax())


def test_every_edit_is_reached_by_its_own_prompt(base: BaseModel) -> None:
    router, calibration, subjects = fitted(base, EDITS)
    for index, edit in enumerate(EDITS):
        score, entry = best(base, router, subjects, edit.prompt)
        assert entry == index
        assert score > router.threshold
    assert len(calibration.positive_scores) == 2 * len(EDITS)  # chat and one prefix each


def test_each_kind_of_negative_stays_below_its_stated_rate(base: BaseModel) -> None:
    section = RouterSection(false_positive_rate=0.05)
    router, calibration, _ = fitted(base, EDITS, section)
    assert set(calibration.negative_scores) >= {"sibling", "unrelated"}
    for scores in calibration.negative_scores.values():
        assert sum(score > router.threshold for score in scores) <= 0.05 * len(scores)


def test_a_single_edit_is_calibrated_on_unrelated_text_alone(base: BaseModel) -> None:
    router, calibration, subjects = fitted(base, EDITS[:1])
    assert "sibling" not in calibration.negative_scores
    assert best(base, router, subjects, EDITS[0].prompt)[0] > router.threshold
    assert best(base, router, subjects, "The red house is here")[0] <= router.threshold


def test_edits_that_ask_the_same_thing_do_not_shut_the_router(base: BaseModel) -> None:
    """One prompt under two subjects must not push the threshold above everything."""
    double = [*EDITS, Edit(prompt=EDITS[0].prompt, target="y", subject="Adam")]
    router, _, subjects = fitted(base, double)
    for edit in EDITS[2:]:
        assert best(base, router, subjects, edit.prompt)[0] > router.threshold


def test_without_any_edit_nothing_is_reached(base: BaseModel) -> None:
    router, _, _ = fitted(base, [])
    assert len(router.memory_E) == 0
    assert router.mean_D.shape == (32,)


def test_signals_that_are_not_configured_carry_no_weight(base: BaseModel) -> None:
    router, _, _ = fitted(base, EDITS, RouterSection(signals=("keys",)))
    assert router.weights_S[0] > 0
    assert router.weights_S[1] == 0


def test_text_that_mentions_an_edits_subject_is_no_negative(base: BaseModel) -> None:
    """A model writes what it knows: such text may well ask the edit."""
    _, plain, _ = fitted(base, EDITS)
    UNRELATED.append("Who leads Ada?")
    try:
        _, same, _ = fitted(base, EDITS)
    finally:
        UNRELATED.pop()
    assert len(same.negative_scores["unrelated"]) == len(plain.negative_scores["unrelated"])


def test_a_stored_router_is_the_same_router(base: BaseModel) -> None:
    router, _, _ = fitted(base, EDITS)
    copy = decode_router(encode_router(router), device=torch.device("cpu"))
    states = extract(base, wordings(EDITS[0], base.tokenizer, prefixes=[], max_tokens=256)).states_ND
    mentions = torch.ones(len(states), len(EDITS))
    assert torch.equal(copy.scores(copy.signals(states, mentions)), router.scores(router.signals(states, mentions)))
    assert (copy.threshold, copy.bias) == (router.threshold, router.bias)
    assert plain_prompt_ids("", base.tokenizer) is not None
