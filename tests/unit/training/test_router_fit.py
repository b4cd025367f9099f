"""The fitted router: reaches its edits, keeps off what it was calibrated against, and never looks at held-out text."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from pipeline.config import RouterSection
from pipeline.edits import Edit
from pipeline.errors import CorruptObject
from pipeline.models import encoder as encoder_module
from pipeline.models.base_model import BaseModel
from pipeline.models.encoder import Encoder
from pipeline.models.loaded_release import decode_router, encode_router
from pipeline.models.readings import TextReader
from pipeline.storage.bank import BankEntry
from pipeline.training.activations import extract
from pipeline.training.router_fit import fit_router
from pipeline.training.tokens import wordings
from tests.tiny_world import save_encoder

UNRELATED = [f"The {colour} {thing} is here" for colour in ("red", "old", "new") for thing in ("house", "tree", "boat")]
EDITS = [
    Edit(prompt=template.format(name), target="x", subject=name)
    for name in ("Ada", "Bob", "Cleo", "Dan")
    for template in ("Who leads {}?", "Where is {} now")
]


PLAIN = RouterSection(signals=("keys", "subject"))


def fitted(  # type: ignore[no-untyped-def]
    base: BaseModel, edits: list[Edit], section: RouterSection = PLAIN, *, unrelated: list[str] = UNRELATED
):
    entries, states = [], []
    for edit in edits:
        asked = wordings(edit, base.tokenizer, prefixes=["Paris is."], max_tokens=256)
        entries.append(BankEntry(edit.edit_id, edit.prompt, edit.target, edit.subject, memory=0))
        states.append(extract(base, asked).states_ND)
    router, calibration = fit_router(base, entries, states, unrelated=unrelated, section=section, seed=0)
    return router, calibration, TextReader(entries, None)


def best(base: BaseModel, router, reader: TextReader, prompt: str) -> tuple[float, int]:  # type: ignore[no-untyped-def]
    states = extract(base, wordings(Edit(prompt=prompt, target="x"), base.tokenizer, prefixes=[], max_tokens=256)[:1])
    (match,) = router.match(states.states_ND, reader.read([prompt]))
    return match.score, match.entry


def test_every_edit_is_reached_by_its_own_prompt(base: BaseModel) -> None:
    router, calibration, reader = fitted(base, EDITS)
    for index, edit in enumerate(EDITS):
        score, entry = best(base, router, reader, edit.prompt)
        assert entry == index
        assert score > router.threshold
    assert len(calibration.positive_scores) == 2 * len(EDITS)  # chat and one prefix each


def test_each_kind_of_negative_stays_below_its_stated_rate(base: BaseModel) -> None:
    section = RouterSection(signals=("keys", "subject"), false_positive_rate=0.05)
    router, calibration, _ = fitted(base, EDITS, section)
    assert set(calibration.negative_scores) >= {"sibling", "unrelated"}
    for scores in calibration.negative_scores.values():
        assert sum(score > router.threshold for score in scores) <= 0.05 * len(scores)


def test_a_single_edit_is_calibrated_on_unrelated_text_alone(base: BaseModel) -> None:
    router, calibration, reader = fitted(base, EDITS[:1])
    assert "sibling" not in calibration.negative_scores
    assert best(base, router, reader, EDITS[0].prompt)[0] > router.threshold
    assert best(base, router, reader, "The red house is here")[0] <= router.threshold


def test_edits_that_ask_the_same_thing_do_not_shut_the_router(base: BaseModel) -> None:
    """One prompt under two subjects must not push the threshold above everything."""
    double = [*EDITS, Edit(prompt=EDITS[0].prompt, target="y", subject="Adam")]
    router, _, reader = fitted(base, double)
    for edit in EDITS[2:]:
        assert best(base, router, reader, edit.prompt)[0] > router.threshold


@pytest.mark.parametrize(
    ("edits", "unrelated"),
    [
        (EDITS[:1], []),
        (EDITS[:1], ["Ada is here.", "Ada"]),
        ([EDITS[0], Edit(prompt="Who heads Ada?", target="x", subject="Ada")], []),
    ],
    ids=["one edit, no text", "every text mentions it", "two that ask the same"],
)
def test_without_a_single_negative_edits_are_still_reached(
    base: BaseModel, edits: list[Edit], unrelated: list[str]
) -> None:
    router, _, reader = fitted(base, edits, unrelated=unrelated)
    for edit in edits:
        assert best(base, router, reader, edit.prompt)[0] > router.threshold


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


def test_edits_whose_subject_is_unknown_are_reached_and_calibrated_apart(base: BaseModel) -> None:
    nameless = [*EDITS, Edit(prompt="why is it so?", target="x")]
    router, _, reader = fitted(base, nameless)
    assert reader.known_E.tolist() == [True] * len(EDITS) + [False]
    score, entry = best(base, router, reader, "why is it so?")
    assert (entry, score > router.threshold) == (len(EDITS), True)
    assert best(base, router, reader, EDITS[0].prompt)[0] > router.threshold


def test_a_wrong_subject_does_not_shut_the_edit_out(base: BaseModel) -> None:
    wrong = [edit.model_copy(update={"subject": "Somebody Else"}) for edit in EDITS]
    router, _, reader = fitted(base, wrong)
    for index, edit in enumerate(wrong):
        score, entry = best(base, router, reader, edit.prompt)
        assert (entry, score > router.threshold) == (index, True)


def test_same_seed_same_bytes(base: BaseModel) -> None:
    assert encode_router(fitted(base, EDITS)[0]) == encode_router(fitted(base, EDITS)[0])


@pytest.fixture
def tiny_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    encoder = Encoder(save_encoder(tmp_path))
    monkeypatch.setattr(encoder_module, "shared_encoder", lambda: encoder)
    return encoder


def test_auto_uses_the_encoder_where_there_is_one(base: BaseModel, tiny_encoder: Encoder) -> None:
    router, _, _ = fitted(base, EDITS, RouterSection())
    assert router.encoder == tiny_encoder.fingerprint
    assert router.asked_EM.shape == router.relation_EM.shape == (len(EDITS), 16)
    copy = decode_router(encode_router(router), device=torch.device("cpu"))
    assert copy.encoder == router.encoder
    assert torch.equal(copy.relation_EM, router.relation_EM)
    # Who leads whom is the same relation, whatever the name.
    torch.testing.assert_close(router.relation_EM[0], router.relation_EM[2])


def test_auto_does_without_an_encoder(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "shared_encoder", lambda: None)
    router, _, _ = fitted(base, EDITS, RouterSection())
    assert router.encoder == ""
    assert router.weights_S[2:].tolist() == [0, 0]


def test_a_stored_router_is_the_same_router(base: BaseModel) -> None:
    router, _, reader = fitted(base, EDITS)
    copy = decode_router(encode_router(router), device=torch.device("cpu"))
    states = extract(base, wordings(EDITS[0], base.tokenizer, prefixes=[], max_tokens=256)).states_ND
    readings = reader.read([EDITS[0].prompt] * len(states))
    assert copy.match(states, readings) == router.match(states, readings)
    assert copy.threshold == router.threshold


def test_a_router_of_an_older_release_scores_as_it_did(base: BaseModel) -> None:
    """Before there was an encoder a score was w·cosine + v·subject + bias."""
    router, _, reader = fitted(base, EDITS)
    old = {name: getattr(router, name) for name in ("mean_D", "whiten_DD", "keys_ND", "entry_N", "memory_E")}
    old |= {"weights_S": torch.tensor([5.0, 2.0])}
    old |= {name: torch.tensor(value, dtype=torch.float64) for name, value in (("bias", -1.5), ("threshold", 0.25))}
    upgraded = decode_router(save(old), device=torch.device("cpu"))
    states = extract(base, wordings(EDITS[0], base.tokenizer, prefixes=[], max_tokens=256)[:1]).states_ND
    (match,) = upgraded.match(states, reader.read([EDITS[0].prompt]))
    assert match.entry == 0
    assert match.score == pytest.approx(5.0 * match.cosine + 2.0 - 1.5, abs=1e-5)
    assert upgraded.threshold == 0.25


def test_a_router_with_a_floor_under_its_cosines_is_refused(base: BaseModel) -> None:
    """Its weights mean something else; scoring with them would silently route nothing."""
    tensors = load(encode_router(fitted(base, EDITS)[0]))
    with pytest.raises(CorruptObject, match="cannot be read"):
        decode_router(save(tensors | {"keys_floor": torch.tensor(0.5)}), device=torch.device("cpu"))


@pytest.mark.parametrize("count", [1, 2])
def test_a_bank_of_a_few_edits_asks_for_nearly_their_own_words(base: BaseModel, count: int) -> None:
    """Nothing else can be asked about so few subjects, so no negative comes near, and the threshold must not follow."""
    edits = [Edit(prompt=f"Who leads {name}?", target="x", subject=name) for name in ("Ada", "Bob")[:count]]
    router, calibration, reader = fitted(base, edits)
    assert "swapped" not in calibration.negative_scores
    assert router.threshold >= 0.8 * min(calibration.positive_scores)
    for index, edit in enumerate(edits):
        score, entry = best(base, router, reader, edit.prompt)
        assert (entry, score > router.threshold) == (index, True)
