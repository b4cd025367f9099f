"""The router's small model: weights of the signals, and the threshold at a stated false-positive rate.

What an edit carries for fitting are copies of its own prompt behind other text. On them every signal looks perfect,
so a model fitted on them alone would trust whichever separates the copies best and miss real paraphrases. So the
weights come from questions that really are worded differently: fitted once, shipped here (`PRIOR`), and moved by a
release only as far as it has paraphrases of its own to show. A release always sets its own threshold, from negatives.
"""

import torch
from torch import Tensor

# Weights of SIGNALS with and without the encoder. Text signals: `python -m benchmarks.routing --fit` on CounterFact
# rows 5,000-9,999. `keys`: on tuning facts of two models and on the demo's own edits (docs/experiments.md).
PRIOR = (9.0, 4.29, 2.57, 1.41)
PRIOR_WITHOUT_ENCODER = (9.0, 5.37, 0.0, 0.0)
PRIOR_PRECISION = 0.2  # a normal prior of deviation 1.6 around each weight
LOGISTIC_L2 = 1e-3  # only keeps the weights finite when the classes separate perfectly


def fit_logistic(
    positives_PS: Tensor, negatives_MS: Tensor, *, prior_S: Tensor, pull: float = LOGISTIC_L2
) -> tuple[Tensor, float]:
    """Weights and bias of P(in scope | signals), both classes weighted equally; `pull` draws the weights to the prior,
    and a signal whose prior is 0 stays off.

    Weights are kept ≥ 0: a stronger match never argues against an edit.
    """
    signals = torch.cat([positives_PS, negatives_MS]).double()
    labels = torch.cat([torch.ones(len(positives_PS)), torch.zeros(len(negatives_MS))]).double()
    balance = torch.where(labels == 1, 0.5 / max(len(positives_PS), 1), 0.5 / max(len(negatives_MS), 1)).double()
    prior = prior_S.double()
    raw = torch.zeros(len(prior) + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([raw], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        weights = raw[:-1].square() * (prior > 0)
        logits = signals @ weights + raw[-1]
        errors = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        value = (balance * errors).sum() + pull * (weights - prior).square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.no_grad():
        raw[:-1] = prior.sqrt()
    optimiser.step(loss)  # type: ignore[no-untyped-call]
    weights = (raw.detach()[:-1].square() * (prior > 0)).float()
    return weights, float(raw.detach()[-1])


def threshold_at(negative_scores_M: Tensor, *, false_positive_rate: float, asked: int | None = None) -> float:
    """Lowest threshold that at most the stated share of the negatives passes (a score must exceed it). `asked`: of how
    many questions these negatives are the ones that could go wrong."""
    ranked = negative_scores_M.sort(descending=True).values
    return float(ranked[min(int(false_positive_rate * (asked or len(ranked))), len(ranked) - 1)])
