"""The router: main memory or which side memory, once per sequence.

A bank holds one entry per edit, with the whitened base-model states (at the last prompt token, entering layer L) of the
wordings the edit was trained on. A prompt is scored against every entry by a small logistic model over the signals; the
best entry is routed to when its score passes the threshold. This replaces the paper's Δ_act > ε: it needs no margin
loss, and it names the edit that was matched.

    signal    value per (prompt, entry)
    keys      cosine of whitened states, the best over the entry's wordings
    subject   +1 the prompt mentions the edit's subject, −1 it does not, 0 the edit has none

Shape letters: B prompts, E entries, N keys (all wordings of all entries), D d_model, S signals.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIGNALS = ("keys", "subject")
WHITENING_RIDGE = 1.0  # of the mean variance; measured against 0.1, see docs/experiments.md
LOGISTIC_L2 = 1e-3  # only keeps the weights finite when the classes separate perfectly


@dataclass(frozen=True)
class Router:
    mean_D: Tensor  # over unrelated text
    whiten_DD: Tensor
    keys_ND: Tensor  # unit length, whitened
    entry_N: Tensor  # which entry a key belongs to; ascending
    memory_E: Tensor  # which side memory holds an entry's edit
    weights_S: Tensor  # logistic weights, zero for a signal that is switched off
    bias: float
    threshold: float

    def signals(self, states_BD: Tensor, subject_BE: Tensor) -> Tensor:
        """B × E × S values of the signals."""
        cosine_BN = whitened(states_BD, self.mean_D, self.whiten_DD) @ self.keys_ND.T
        cosine_BE = cosine_BN.new_full((len(states_BD), len(self.memory_E)), -1.0)
        cosine_BE.scatter_reduce_(1, self.entry_N.expand_as(cosine_BN), cosine_BN, reduce="amax")
        return torch.stack([cosine_BE, subject_BE.to(cosine_BE)], dim=2)

    def scores(self, signals_BES: Tensor) -> Tensor:
        """B × E logits of "this prompt asks this edit"."""
        scores_BE: Tensor = signals_BES @ self.weights_S + self.bias
        return scores_BE


def empty_router(width: int) -> Router:
    """A router without entries: every prompt stays with the main memory. `width`: D."""
    return Router(
        mean_D=torch.zeros(width),
        whiten_DD=torch.eye(width),
        keys_ND=torch.zeros(0, width),
        entry_N=torch.zeros(0, dtype=torch.long),
        memory_E=torch.zeros(0, dtype=torch.long),
        weights_S=torch.zeros(len(SIGNALS)),
        bias=0.0,
        threshold=0.0,
    )


def whitening(deviations_MD: Tensor) -> Tensor:
    """(Σ + ridge)^(−1/2) of how states deviate within one edit: what differs between wordings of the same question is
    noise, and is scaled down (within-class covariance normalisation, Hatch et al., Interspeech 2006)."""
    deviations_MD = deviations_MD.double()
    variance_D, basis_DD = torch.linalg.eigh(deviations_MD.T @ deviations_MD / len(deviations_MD))
    variance_D = variance_D.clamp(min=0)
    ridge = WHITENING_RIDGE * float(variance_D.mean()) or 1.0  # without any deviation nothing is scaled
    whiten_DD: Tensor = ((basis_DD * (variance_D + ridge).rsqrt()) @ basis_DD.T).float()
    return whiten_DD


def whitened(states_BD: Tensor, mean_D: Tensor, whiten_DD: Tensor) -> Tensor:
    """Whitened states of unit length."""
    unit_BD: Tensor = torch.nn.functional.normalize((states_BD.float() - mean_D) @ whiten_DD, dim=1)
    return unit_BD


def fit_logistic(positives_PS: Tensor, negatives_MS: Tensor, *, active: Sequence[bool]) -> tuple[Tensor, float]:
    """Weights and bias of P(in scope | signals), both classes weighted equally; inactive signals get weight 0.

    Weights are kept ≥ 0: a stronger match never argues against an edit.
    """
    signals = torch.cat([positives_PS, negatives_MS]).double()
    labels = torch.cat([torch.ones(len(positives_PS)), torch.zeros(len(negatives_MS))]).double()
    balance = torch.where(labels == 1, 0.5 / max(len(positives_PS), 1), 0.5 / max(len(negatives_MS), 1)).double()
    on = torch.tensor(active, dtype=torch.float64)
    raw = torch.zeros(len(active) + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([raw], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        weights = raw[:-1].square() * on
        logits = signals @ weights + raw[-1]
        errors = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        value = (balance * errors).sum() + LOGISTIC_L2 * weights.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.no_grad():
        raw[:-1] = 1.0
    optimiser.step(loss)  # type: ignore[no-untyped-call]
    weights = (raw.detach()[:-1].square() * on).float()
    return weights, float(raw.detach()[-1])


def threshold_at(negative_scores_M: Tensor, *, false_positive_rate: float) -> float:
    """Lowest threshold that at most the stated share of the negatives passes (a score must exceed it)."""
    ranked = negative_scores_M.sort(descending=True).values
    return float(ranked[min(int(false_positive_rate * len(ranked)), len(ranked) - 1)])
