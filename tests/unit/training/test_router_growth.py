"""A router that grows reaches the new entries, and goes on to treat the old ones as it did."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.config import RouterSection
from pipeline.models import encoder as encoder_module
from pipeline.models.base_model import BaseModel
from pipeline.models.encoder import Encoder
from pipeline.models.readings import TextReader
from pipeline.storage.bank import BankEntry
from pipeline.training.prompt_reader import PromptReader
from pipeline.training.router_fit import fit_router
from pipeline.training.router_growth import grown, is_a_beginner, is_outgrown, reached, without
from pipeline.wise.routing import Router
from tests.tiny_world import save_encoder

NAMES = ["Ada", "Bob", "Cleo", "Dora", "Emil", "Fay"]
ENTRIES = [BankEntry(name, f"Who leads {name}?", f"new {name}", name, memory=0) for name in NAMES]
TEXTS = ["The red house is here.", "A boat is old.", "They read a long book."]
OLD = 4


def states_of(base: BaseModel) -> list[Tensor]:
    reader = PromptReader(base)
    return [reader.read([entry.prompt, f"Well. {entry.prompt}"]).states_ND for entry in ENTRIES]


@pytest.fixture(params=[False, True], ids=["without encoder", "with encoder"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder | None:
    return Encoder(save_encoder(tmp_path_factory.mktemp("encoder"))) if request.param else None


def fitted(base: BaseModel, states: list[Tensor], encoder: Encoder | None, monkeypatch: pytest.MonkeyPatch) -> Router:
    monkeypatch.setattr(encoder_module, "shared_encoder", lambda: encoder)
    router, _ = fit_router(
        base, ENTRIES[:OLD], states[:OLD], unrelated=TEXTS, section=RouterSection(false_positive_rate=0.2), seed=0
    )
    return router


def test_new_entries_are_scored_and_old_ones_as_before(
    base: BaseModel, encoder: Encoder | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = states_of(base)
    router = fitted(base, states, encoder, monkeypatch)
    bigger = grown(router, ENTRIES, states[OLD:], encoder=encoder)
    assert (bigger.threshold, len(bigger.memory_E)) == (router.threshold, len(ENTRIES))
    read = TextReader(ENTRIES, encoder).read([entry.prompt for entry in ENTRIES])
    matches = bigger.match(torch.stack([rows[0] for rows in states]), read)
    assert [match.entry for match in matches] == list(range(len(ENTRIES)))
    before = router.match(
        torch.stack([rows[0] for rows in states[:OLD]]),
        TextReader(ENTRIES[:OLD], encoder).read([entry.prompt for entry in ENTRIES[:OLD]]),
    )
    for one, other in zip(before, matches, strict=False):
        assert one.score == pytest.approx(other.score, abs=1e-5)
    if encoder is not None:
        whole = TextReader(ENTRIES, encoder).embeddings()[0]
        assert torch.equal(bigger.asked_EM, whole)


def test_entries_that_leave_take_nothing_with_them(
    base: BaseModel, encoder: Encoder | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Growing and shrinking again gives the router there was; taking one from the middle keeps the others' scores."""
    states = states_of(base)
    router = fitted(base, states, encoder, monkeypatch)
    again = without(grown(router, ENTRIES, states[OLD:], encoder=encoder), range(OLD), memories=[0] * OLD)
    for name in ("keys_ND", "entry_N", "memory_E", "asked_EM", "relation_EM", "bias_E"):
        assert torch.equal(getattr(again, name), getattr(router, name)), name
    kept = [0, 2, 3]
    smaller = without(router, kept, memories=[5, 6, 7])
    assert smaller.memory_E.tolist() == [5, 6, 7]
    reader = TextReader([ENTRIES[place] for place in kept], encoder)
    matches = smaller.match(
        torch.stack([states[place][0] for place in kept]), reader.read([ENTRIES[place].prompt for place in kept])
    )
    assert [match.entry for match in matches] == [0, 1, 2]


def test_an_entry_is_reached_when_its_own_prompt_is_routed_to_it(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = states_of(base)
    router = fitted(base, states, None, monkeypatch)
    bigger = replace(grown(router, ENTRIES, states[OLD:], encoder=None), threshold=-1e6)
    assert reached(bigger, ENTRIES, states[OLD:], encoder=None) == [True, True]
    assert reached(replace(bigger, threshold=1e6), ENTRIES, states[OLD:], encoder=None) == [False, False]
    twins = [*ENTRIES[:OLD], ENTRIES[OLD], replace(ENTRIES[OLD], edit_id="twin")]
    doubled = grown(router, twins, [states[OLD]] * 2, encoder=None)
    assert reached(replace(doubled, threshold=-1e6), twins, [states[OLD]] * 2, encoder=None).count(True) == 1


def test_a_bank_outgrows_its_router_by_half() -> None:
    assert is_outgrown(1, fitted_on=0, in_a_stream=True)
    assert is_outgrown(16, fitted_on=10, in_a_stream=True)  # it costs little
    assert not is_outgrown(150, fitted_on=100, in_a_stream=False)
    assert is_outgrown(151, fitted_on=100, in_a_stream=False)
    assert not is_outgrown(400, fitted_on=100, in_a_stream=True)
    assert is_outgrown(401, fitted_on=100, in_a_stream=True)
    assert not is_outgrown(5000, fitted_on=100, in_a_stream=False)  # left to the round


def test_a_stream_waits_for_a_router_only_while_that_knows_little() -> None:
    assert is_a_beginner(100, fitted_on=0)
    assert is_a_beginner(3, fitted_on=1)
    assert is_a_beginner(125, fitted_on=31)
    assert not is_a_beginner(124, fitted_on=31)
    assert not is_a_beginner(2000, fitted_on=32)
