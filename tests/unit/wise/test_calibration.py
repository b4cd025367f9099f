"""The logistic fit and the threshold."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.wise.calibration import fit_logistic, threshold_at


def classes() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inside = torch.stack([0.8 + 0.1 * torch.rand(200, generator=generator), torch.ones(200)], dim=1)
    outside = torch.stack([0.6 * torch.rand(900, generator=generator), torch.ones(900)], dim=1)
    return inside, outside


def test_logistic_separates_and_never_votes_against_a_match() -> None:
    inside, outside = classes()
    weights, bias = fit_logistic(inside, outside, prior_S=torch.ones(2))
    assert (weights >= 0).all()
    assert float((inside @ weights + bias).min()) > float((outside @ weights + bias).max())


def test_a_signal_that_is_switched_off_has_no_weight() -> None:
    weights, _ = fit_logistic(torch.tensor([[0.9, 1.0]]), torch.tensor([[0.1, -1.0]]), prior_S=torch.tensor([1.0, 0.0]))
    assert weights[0] > 0
    assert weights[1] == 0


def test_a_strong_pull_keeps_the_prior_and_a_weak_one_does_not() -> None:
    inside, outside = classes()
    prior = torch.tensor([3.0, 2.0])
    kept, _ = fit_logistic(inside, outside, prior_S=prior, pull=1e4)
    moved, _ = fit_logistic(inside, outside, prior_S=prior, pull=1e-4)
    torch.testing.assert_close(kept, prior, atol=1e-2, rtol=0)
    assert moved[0] > prior[0] + 1  # the first signal is what tells the classes apart


@settings(deadline=None)
@given(
    scores=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=300),
    rate=st.floats(0.001, 0.5),
    harmless=st.integers(0, 300),
)
def test_at_most_the_stated_share_of_what_was_asked_passes(scores: list[float], rate: float, harmless: int) -> None:
    negatives, asked = torch.tensor(scores), len(scores) + harmless
    threshold = threshold_at(negatives, false_positive_rate=rate, asked=asked)
    assert int((negatives > threshold).sum()) <= rate * asked
