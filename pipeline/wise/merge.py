"""Merge K shard deltas into one side memory: one row of METHODS per method, each stage named after the paper's step.

Shape letters: K shards, D d_model, F d_ff, N keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MergeInput:
    """What a merge may read. `trained_KDF` marks the entries each shard could move (its mask)."""

    deltas_KDF: Tensor
    trained_KDF: Tensor
    keys_NF: Sequence[Tensor]  # one N_k × F per shard: A(x) of its own edits
    ties_density: float
    keyed_ridge: float


@dataclass(frozen=True)
class MergeMethod:
    merge: Callable[[MergeInput], Tensor]
    paper: str


def ties(given: MergeInput) -> Tensor:
    """Ties-Merge: trim, elect, disjoint mean (arXiv:2306.01708, Alg. 1). WISE's default (§2.3.2)."""
    trimmed_KDF = trim(given.deltas_KDF, given.trained_KDF, density=given.ties_density)
    return disjoint_mean(trimmed_KDF, elect_signs(trimmed_KDF))


def keyed(given: MergeInput) -> Tensor:
    """The matrix that answers each shard's own keys as that shard does.

    ΔW = argmin Σ_k ‖(ΔW − ΔW_k) A_k‖² + λ‖ΔW‖², the regression mean of arXiv:2212.09849 on the shards' own keys with a
    ridge towards zero; solved in the smaller of its two dual forms, N × N or F × F, in float64.
    """
    keys_NF = torch.cat(list(given.keys_NF)).double()
    outputs_ND = torch.cat(
        [keys.double() @ delta_DF.double().T for keys, delta_DF in zip(given.keys_NF, given.deltas_KDF, strict=True)]
    )
    N, F = keys_NF.shape
    if N <= F:
        gram_NN = keys_NF @ keys_NF.T + given.keyed_ridge * torch.eye(N, dtype=torch.float64)
        solved_FD = keys_NF.T @ torch.cholesky_solve(outputs_ND, torch.linalg.cholesky(gram_NN))
    else:
        gram_FF = keys_NF.T @ keys_NF + given.keyed_ridge * torch.eye(F, dtype=torch.float64)
        solved_FD = torch.cholesky_solve(keys_NF.T @ outputs_ND, torch.linalg.cholesky(gram_FF))
    return solved_FD.T.float().contiguous()


METHODS: dict[str, MergeMethod] = {
    "ties": MergeMethod(ties, paper="arXiv:2306.01708"),
    "keyed": MergeMethod(keyed, paper="arXiv:2212.09849"),
}


def trim(deltas_KDF: Tensor, trained_KDF: Tensor, *, density: float) -> Tensor:
    """Keep each shard's largest entries by magnitude and set the others to zero.

    The density counts the *trained* entries of a shard: counted over all entries, a density of 0.53 would trim nothing
    from a 20 % mask. Ties at the threshold are all kept.
    """
    kept = []
    for delta_DF, trained_DF in zip(deltas_KDF, trained_KDF, strict=True):
        magnitudes = delta_DF[trained_DF].abs()
        count = max(1, round(density * magnitudes.numel())) if magnitudes.numel() else 0
        if count == magnitudes.numel():
            kept.append(delta_DF)
            continue
        threshold = magnitudes.kthvalue(magnitudes.numel() - count + 1).values
        kept.append(torch.where(delta_DF.abs() >= threshold, delta_DF, 0))
    return torch.stack(kept)


def elect_signs(deltas_KDF: Tensor) -> Tensor:
    """Sign with the larger total magnitude; 0 where the shards cancel exactly (arXiv:2306.01708, Alg. 1)."""
    return deltas_KDF.sum(dim=0).sign()


def disjoint_mean(deltas_KDF: Tensor, signs_DF: Tensor) -> Tensor:
    """Mean over the shards that agree with the elected sign; shards that are zero there do not count."""
    agrees_KDF = (deltas_KDF.sign() == signs_DF) & (deltas_KDF != 0)
    return (deltas_KDF * agrees_KDF).sum(dim=0) / agrees_KDF.sum(dim=0).clamp(min=1)
