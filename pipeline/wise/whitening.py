"""Coordinates in which the keys of the edits lie apart, to train ΔW in.

Keys A(x) of short questions share most of their length: of 998 CounterFact edits one direction carries two thirds of
Σ ‖a‖², and the median direction an eight-thousandth of that. A step on ΔW for one edit then moves every other edit's
output too, and training crawls along the directions that tell edits apart. So what is optimised is V, with

    ΔW = V P,        P = c · (KᵀK / N + λ m I)^(−1/2),        m = tr(KᵀK) / (N F)

over the N keys K at which edits are written: P a is near to orthogonal to P b for different edits, and a step on V for
one hardly moves the other. c keeps the mean length of keys, so that a learning rate means what it means without. A
plain gradient step on V is one on ΔW times C⁻¹, as ROME and MEMIT have it (arXiv:2202.05262, 2210.07229), with the
edits' own keys for C. What ΔW can be reached is the same, and how fast is not. Not in the paper.

Shape letters: N keys, D d_model, F d_ff, R rank of the keys (at most N and F).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Whitening:
    """P as r I + Uᵀ diag(g − r) U; never materialised, F is 11,008 for a model of 7 B parameters."""

    basis_RF: Tensor  # orthonormal rows
    gains_R: Tensor
    rest: float  # gain of directions that no key has

    def __call__(self, matrix_DF: Tensor) -> Tensor:
        """D × F: `matrix_DF` P."""
        along_DR = matrix_DF @ self.basis_RF.T
        return self.rest * matrix_DF + (along_DR * (self.gains_R - self.rest)) @ self.basis_RF


def key_whitening(keys_NF: Tensor, *, ridge: float) -> Whitening:
    """`ridge`: λ, how little a direction without keys may count against the mean one. Equal keys count once: an edit's
    wordings read the same ones. Without keys, or when all are zero, P is the identity."""
    keys_NF = torch.unique(keys_NF.double(), dim=0)
    mean = float(keys_NF.square().mean()) if len(keys_NF) else 0.0
    if mean == 0:
        return Whitening(keys_NF.new_zeros(0, keys_NF.shape[1]).float(), keys_NF.new_zeros(0).float(), 1.0)
    _, lengths_R, basis_RF = torch.linalg.svd(keys_NF, full_matrices=False)
    gains_R = (lengths_R.square() / (len(keys_NF) * mean) + ridge).rsqrt()
    longer = (keys_NF @ basis_RF.T * gains_R).norm(dim=1).mean() / keys_NF.norm(dim=1).mean()
    return Whitening(basis_RF.float(), (gains_R / longer).float(), float(ridge**-0.5 / longer))
