"""The router's arithmetic: whitening, signals, the logistic fit and the threshold."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.wise.routing import Router, fit_logistic, threshold_at, whitened, whitening


def router(keys: torch.Tensor, entries: list[int], *, weights: tuple[float, float] = (1.0, 0.0)) -> Router:
    D = keys.shape[1]
    return Router(
        mean_D=torch.zeros(D),
        whiten_DD=torch.eye(D),
        keys_ND=torch.nn.functional.normalize(keys, dim=1),
        entry_N=torch.tensor(entries),
        memory_E=torch.zeros(max(entries) + 1, dtype=torch.long),
        weights_S=torch.tensor(weights),
        bias=0.0,
        threshold=0.5,
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


@given(scale=st.floats(0.1, 100), seed=st.integers(0, 1000))
def test_similarity_is_a_cosine(scale: float, seed: int) -> None:
    state = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed))
    plain = router(torch.eye(4), [0, 1, 2, 3])
    similarity = plain.signals(state * scale, torch.zeros(1, 4))[..., 0]
    torch.testing.assert_close(similarity, torch.nn.functional.normalize(state, dim=1), atol=1e-5, rtol=1e-5)


def test_an_entry_is_as_near_as_its_nearest_wording() -> None:
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    signals = router(keys, [0, 0, 1]).signals(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, -1.0]]))
    assert signals.tolist() == [[[1.0, 1.0], [0.0, -1.0]]]


def test_logistic_separates_and_never_votes_against_a_match() -> None:
    generator = torch.Generator().manual_seed(1)
    inside = torch.stack([0.8 + 0.1 * torch.rand(200, generator=generator), torch.ones(200)], dim=1)
    outside = torch.stack([0.6 * torch.rand(900, generator=generator), torch.ones(900)], dim=1)
    weights, bias = fit_logistic(inside, outside, active=[True, True])
    assert (weights >= 0).all()
    assert float((inside @ weights + bias).min()) > float((outside @ weights + bias).max())


def test_a_signal_that_is_switched_off_has_no_weight() -> None:
    weights, _ = fit_logistic(torch.tensor([[0.9, 1.0]]), torch.tensor([[0.1, -1.0]]), active=[True, False])
    assert weights[0] > 0
    assert weights[1] == 0


@given(
    scores=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=300),
    rate=st.floats(0.001, 0.5),
)
def test_at_most_the_stated_share_of_negatives_passes(scores: list[float], rate: float) -> None:
    negatives = torch.tensor(scores)
    threshold = threshold_at(negatives, false_positive_rate=rate)
    assert int((negatives > threshold).sum()) <= rate * len(scores)


def test_whitened_states_have_unit_length() -> None:
    states = torch.randn(9, 3, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(whitened(states, torch.zeros(3), torch.eye(3)).norm(dim=1), torch.ones(9))
