"""The router's arithmetic: whitening, signals, and matching in small and large banks."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.wise import routing
from pipeline.wise.routing import Reading, Router, empty_router, whitened, whitening

unit = torch.nn.functional.normalize


def router(keys: Tensor, entries: list[int], **changes: object) -> Router:
    D, E = keys.shape[1], max(entries) + 1
    fields: dict[str, object] = {
        "mean_D": torch.zeros(D),
        "whiten_DD": torch.eye(D),
        "keys_ND": unit(keys, dim=1),
        "entry_N": torch.tensor(entries),
        "memory_E": torch.zeros(E, dtype=torch.long),
        "asked_EM": torch.zeros(E, 0),
        "relation_EM": torch.zeros(E, 0),
        "weights_S": torch.tensor([1.0, 0.0, 0.0, 0.0]),
        "bias_E": torch.zeros(E),
        "threshold": 0.5,
    }
    return Router(**{**fields, **changes})  # type: ignore[arg-type]


def reading(E: int, mentioned: dict[int, float] | None = None, *, M: int = 0, seed: int = 0) -> Reading:
    generator = torch.Generator().manual_seed(seed)
    entries = sorted(mentioned or {})
    return Reading(
        known_E=torch.arange(E) % 3 != 2,  # every third subject is unknown
        entries_C=torch.tensor(entries, dtype=torch.long),
        subject_C=torch.tensor([(mentioned or {})[entry] for entry in entries]),
        masked_C=torch.zeros(len(entries), dtype=torch.long),
        asked_M=unit(torch.randn(M, generator=generator), dim=0) if M else torch.zeros(0),
        masked_RM=unit(torch.randn(1, M, generator=generator), dim=1) if M and entries else torch.zeros(0, M),
    )


def by_hand(bank: Router, state_D: Tensor, read: Reading) -> Tensor:
    """Oracle: every entry's score, one at a time."""
    query_D = unit((state_D - bank.mean_D) @ bank.whiten_DD, dim=0)
    scores = []
    for entry in range(len(bank.memory_E)):
        keys = max(float(key_D @ query_D) for key_D in bank.keys_ND[bank.entry_N == entry])
        subject, relation = (-1.0 if read.known_E[entry] else 0.0), 0.0
        asked = float(bank.asked_EM[entry].float() @ read.asked_M) if len(read.asked_M) else 0.0
        if entry in read.entries_C.tolist():
            place = read.entries_C.tolist().index(entry)
            subject = float(read.subject_C[place])
            if len(read.masked_RM):
                relation = float(bank.relation_EM[entry].float() @ read.masked_RM[int(read.masked_C[place])])
        signals = torch.tensor([keys, subject, asked, relation])
        scores.append(float(signals @ bank.weights_S + bank.bias_E[entry]))
    return torch.tensor(scores)


def random_bank(E: int, *, D: int = 8, M: int = 6, seed: int = 0) -> Router:
    generator = torch.Generator().manual_seed(seed)
    wordings = torch.randint(1, 4, (E,), generator=generator)
    owners = torch.repeat_interleave(torch.arange(E), wordings)
    return router(
        torch.randn(len(owners), D, generator=generator),
        owners.tolist(),
        asked_EM=unit(torch.randn(E, M, generator=generator), dim=1),
        relation_EM=unit(torch.randn(E, M, generator=generator), dim=1),
        weights_S=torch.tensor([2.0, 3.0, 1.5, 1.0]),
        bias_E=torch.randn(E, generator=generator),
    )


def test_whitening_scales_down_what_differs_between_wordings() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([5.0, 3.0, 2.0, 2.0, 1.0, 4.0])
    deviations = torch.randn(5000, 6, generator=generator) * spread
    covariance = torch.cov((deviations @ whitening(deviations)).T)
    ridge = spread.square().mean()  # the ridge is the mean variance
    torch.testing.assert_close(covariance.diag(), spread.square() / (spread.square() + ridge), atol=0.03, rtol=0.05)
    assert float((covariance - torch.diag(covariance.diag())).abs().max()) < 0.03


def test_without_any_deviation_nothing_is_scaled() -> None:
    torch.testing.assert_close(whitening(torch.zeros(3, 4)), torch.eye(4))


def test_whitened_states_have_unit_length() -> None:
    states = torch.randn(9, 3, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(whitened(states, torch.zeros(3), torch.eye(3)).norm(dim=1), torch.ones(9))


@settings(deadline=None)
@given(scale=st.floats(0.1, 100), seed=st.integers(0, 1000))
def test_similarity_is_a_cosine(scale: float, seed: int) -> None:
    state_D = torch.randn(4, generator=torch.Generator().manual_seed(seed))
    bank = router(torch.eye(4), [0, 1, 2, 3])
    (match,) = bank.match(state_D[None] * scale, [reading(4)])
    assert match.cosine == pytest.approx(float(unit(state_D, dim=0).max()), abs=1e-5)


def test_an_entry_is_as_near_as_its_nearest_wording() -> None:
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    (match,) = router(keys, [0, 0, 1]).match(torch.tensor([[0.0, 2.0]]), [reading(2)])
    assert (match.entry, match.cosine) == (0, 1.0)


@settings(deadline=None)
@given(seed=st.integers(0, 500), mentioned=st.dictionaries(st.integers(0, 6), st.sampled_from([1.0, 0.5, 0.0])))
def test_the_best_entry_is_the_best_of_all_scores_taken_one_by_one(seed: int, mentioned: dict[int, float]) -> None:
    bank, read = random_bank(7, seed=seed), reading(7, mentioned, M=6, seed=seed)
    state_D = torch.randn(8, generator=torch.Generator().manual_seed(seed + 1))
    wanted = by_hand(bank, state_D, read)
    (match,) = bank.match(state_D[None], [read])
    assert match.score == pytest.approx(float(wanted.max()), abs=1e-4)
    assert wanted[match.entry] == pytest.approx(float(wanted.max()), abs=1e-4)
    own = bank.signals_of(state_D, read, 3)
    assert float(own @ bank.weights_S + bank.bias_E[3]) == pytest.approx(float(wanted[3]), abs=1e-4)


def test_hidden_entries_are_not_found() -> None:
    bank = router(torch.eye(3), [0, 1, 2])
    (match,) = bank.match(torch.tensor([[3.0, 2.0, 1.0]]), [reading(3)], hidden=[{0}])
    assert match.entry == 1


@settings(deadline=None)
@given(seed=st.integers(0, 100), out=st.sets(st.integers(0, 8), max_size=8))
def test_a_bias_of_minus_infinity_hides_entries_from_every_prompt(seed: int, out: set[int]) -> None:
    bank, states = random_bank(9, seed=seed), torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    readings = [reading(9, {row: 1.0}, M=6, seed=row) for row in range(3)]
    without = replace(bank, bias_E=bank.bias_E.index_fill(0, torch.tensor(sorted(out), dtype=torch.long), -torch.inf))
    assert without.match(states, readings) == bank.match(states, readings, hidden=[out] * 3)


def test_a_large_bank_looks_for_candidates_among_entries_that_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest half is hidden: as candidates they would leave no room for the others."""
    E = 5000
    bank = random_bank(E, D=16, M=8)
    state_D = bank.keys_ND[0]
    near_E = by_keys(bank, state_D) > by_keys(bank, state_D).median()
    bank = replace(bank, bias_E=torch.zeros(E).masked_fill(near_E, -torch.inf))
    blank = replace(reading(E, M=8), known_E=torch.zeros(E, dtype=torch.bool))
    (sketched,) = bank.match(state_D[None], [blank])
    assert not near_E[sketched.entry]
    monkeypatch.setattr(routing, "FULLY_SCORED", E)
    (whole,) = bank.match(state_D[None], [blank])
    assert sketched.score >= whole.score - 0.1


def by_keys(bank: Router, state_D: Tensor) -> Tensor:
    cosine_N = bank.keys_ND @ state_D
    return torch.full((len(bank.memory_E),), -1.0).scatter_reduce_(0, bank.entry_N, cosine_N, reduce="amax")


def test_without_entries_nothing_is_matched() -> None:
    (match,) = empty_router(4).match(torch.ones(1, 4), [reading(0)])
    assert match.score == float("-inf")


@settings(deadline=None)
@given(seed=st.integers(0, 100), others=st.integers(0, 40))
def test_a_prompt_scores_to_the_bit_as_it_does_alone(seed: int, others: int) -> None:
    bank = random_bank(9, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(others + 1, 8, generator=generator)
    readings = [reading(9, {row % 9: 1.0}, M=6, seed=row) for row in range(others + 1)]
    together = bank.match(states, readings)
    assert together == [bank.match(states[row : row + 1], [readings[row]])[0] for row in range(others + 1)]


def test_a_large_bank_finds_what_scoring_every_entry_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts near an entry in keys and meaning; some mention it, some mention another entry."""
    E = 5000
    bank = random_bank(E, D=64, M=32)
    generator = torch.Generator().manual_seed(3)
    centre_ED = unit(torch.randn(E, 64, generator=generator), dim=1)  # wordings of an entry are near each other
    noise_ND = 0.02 * torch.randn(len(bank.entry_N), 64, generator=generator)
    bank = replace(bank, keys_ND=unit(centre_ED[bank.entry_N] + noise_ND, dim=1))
    chosen = torch.randint(0, E, (40,), generator=generator).tolist()
    states = centre_ED[chosen] + 0.02 * torch.randn(40, 64, generator=generator)
    readings = [
        replace(reading(E, {entry: 1.0} if row % 2 else {(7 * row) % E: 0.5}, M=32), asked_M=bank.asked_EM[entry])
        for row, entry in enumerate(chosen)
    ]
    sketched = bank.match(states, readings)
    assert [match.entry for match in sketched[1::2]] == chosen[1::2]
    assert sketched[:7] == [bank.match(states[row : row + 1], [readings[row]])[0] for row in range(7)]
    monkeypatch.setattr(routing, "FULLY_SCORED", E)
    whole = bank.match(states, readings)
    assert [match.entry for match in whole] == [match.entry for match in sketched]
    assert [match.score for match in whole] == pytest.approx([match.score for match in sketched], abs=1e-5)
