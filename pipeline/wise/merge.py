"""Merge K shard deltas into one side memory: one row of METHODS per method, each stage named after the paper's step.

What a method leaves out of each shard first is in trimming.py. None of the scaling factors that the papers tune on
held-out data (λ, α, weights) is an option here: they are 1, and each row says what that means.

Shape letters: K shards, D d_model, F d_ff, N keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.wise.trimming import breadcrumbs_of, drop_and_rescale, mag_prune, trim

RAM_RESCALE = 0.2  # r; with RAM_MOST the authors' published run (a rescale factor of 1.2)
RAM_MOST = 1.0  # α


@dataclass(frozen=True)
class MergeInput:
    """What a merge may read. `trained_KDF` marks the entries each shard could move (its mask), `density` is the share
    of them that trimming keeps. The seed and each shard's index in its memory choose what is dropped at random."""

    deltas_KDF: Tensor
    trained_KDF: Tensor
    keys_NF: Sequence[Tensor]  # one N_k × F per shard: A(x) of its own edits
    shards_K: Sequence[int]
    seed: int
    density: float
    keyed_ridge: float


@dataclass(frozen=True)
class MergeMethod:
    """`density` is what `merge.density: auto` means. Of disjoint shards trained with the sibling penalty, leaving
    entries out only lost edits, most at the 0.53 that WISE's reference implementation publishes (docs/experiments.md).
    So Ties trims nothing, and the methods that are a way of leaving out leave out a tenth."""

    merge: Callable[[MergeInput], Tensor]
    paper: str
    density: float = 1.0


def linear(given: MergeInput) -> Tensor:
    """Plain mean over the shards, as of model soups (arXiv:2203.05482). An entry that one shard alone moved shrinks to
    1/K."""
    return given.deltas_KDF.mean(dim=0)


def task_sum(given: MergeInput) -> Tensor:
    """Task arithmetic: Σ_k ΔW_k (arXiv:2212.04089, with λ = 1). With disjoint masks every shard stays as it is."""
    return given.deltas_KDF.sum(dim=0)


def slerp(given: MergeInput) -> Tensor:
    """Spherical mean: Σ_k ΔW_k / ‖Σ_k u_k‖ with u_k = ΔW_k / ‖ΔW_k‖ (Frobenius).

    For two shards this is Shoemake's interpolation (SIGGRAPH 1985) half way, (v_0 + v_1) · sin(θ/2) / sin θ. It is
    defined for two; interpolating one shard after another would make the last one weigh more, so for K > 2 the same
    formula goes on, in which the order does not matter. Parallel shards give their mean, orthogonal ones (disjoint
    masks) Σ / √K. Where the directions cancel there is no spherical mean, and the plain one is returned.
    """
    norms_K11 = given.deltas_KDF.norm(dim=(1, 2), keepdim=True)
    directions_KDF = given.deltas_KDF / norms_K11.clamp(min=torch.finfo(norms_K11.dtype).tiny)
    length = directions_KDF.sum(dim=0).norm()
    return linear(given) if length < 1e-6 else given.deltas_KDF.sum(dim=0) / length


def sign(given: MergeInput) -> Tensor:
    """Ties-Merge without its trim: elect, disjoint mean. `sign` in WISE's reference implementation."""
    return disjoint_mean(given.deltas_KDF, elect_signs(given.deltas_KDF))


def ties(given: MergeInput) -> Tensor:
    """Ties-Merge: trim, elect, disjoint mean (arXiv:2306.01708, Alg. 1). WISE's default (§2.3.2)."""
    trimmed_KDF = trim(given.deltas_KDF, given.trained_KDF, density=given.density)
    return disjoint_mean(trimmed_KDF, elect_signs(trimmed_KDF))


def dare_linear(given: MergeInput) -> Tensor:
    """DARE, then the plain mean (arXiv:2311.03099). The reference implementation of WISE does not rescale here; the
    paper does."""
    return _dare(given).mean(dim=0)


def dare_ties(given: MergeInput) -> Tensor:
    """DARE in place of Ties-Merge's trim (arXiv:2311.03099, §3.3): drop and rescale, elect, disjoint mean."""
    dropped_KDF = _dare(given)
    return disjoint_mean(dropped_KDF, elect_signs(dropped_KDF))


def della(given: MergeInput) -> Tensor:
    """DELLA: drop by MagPrune, elect, fuse by the disjoint mean (arXiv:2406.11617, with λ = 1)."""
    pruned_KDF = mag_prune(
        given.deltas_KDF, given.trained_KDF, density=given.density, seed=given.seed, shards_K=given.shards_K
    )
    return disjoint_mean(pruned_KDF, elect_signs(pruned_KDF))


def breadcrumbs(given: MergeInput) -> Tensor:
    """Model Breadcrumbs: Σ_k m_k ⊙ ΔW_k, the masks leaving out outliers and small entries (arXiv:2312.06795, with
    α = 1)."""
    return breadcrumbs_of(given.deltas_KDF, given.trained_KDF, density=given.density).sum(dim=0)


def ram(given: MergeInput) -> Tensor:
    """Reinforced Agent Merging (arXiv:2601.13572, RAM+): entries that several shards moved are averaged over those
    shards, entries that one shard alone moved are kept and scaled by λ_k = 1 + r · min(ρ_k, α).

    ρ_k is how many of shard k's entries are shared for each that is its own: what averaging takes from a shard, its own
    entries give back. Moved means non-zero; the paper compares with 1e-5, since its models have no masks.
    """
    moved_KDF = given.deltas_KDF != 0
    movers_DF = moved_KDF.sum(dim=0)
    shared_K = (moved_KDF & (movers_DF > 1)).sum(dim=(1, 2))
    own_K = (moved_KDF & (movers_DF == 1)).sum(dim=(1, 2))
    scale_K = 1 + RAM_RESCALE * (shared_K / own_K.clamp(min=1)).clamp(max=RAM_MOST)
    kept_DF = (given.deltas_KDF * scale_K[:, None, None]).sum(dim=0)
    averaged_DF = given.deltas_KDF.sum(dim=0) / movers_DF.clamp(min=1)
    return torch.where(movers_DF == 1, kept_DF, averaged_DF)


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
    "linear": MergeMethod(linear, paper="arXiv:2203.05482"),
    "sum": MergeMethod(task_sum, paper="arXiv:2212.04089"),
    "slerp": MergeMethod(slerp, paper="doi:10.1145/325334.325242"),
    "sign": MergeMethod(sign, paper="arXiv:2306.01708"),
    "ties": MergeMethod(ties, paper="arXiv:2306.01708"),
    "dare_linear": MergeMethod(dare_linear, paper="arXiv:2311.03099", density=0.9),
    "dare_ties": MergeMethod(dare_ties, paper="arXiv:2311.03099", density=0.9),
    "della": MergeMethod(della, paper="arXiv:2406.11617", density=0.9),
    "breadcrumbs": MergeMethod(breadcrumbs, paper="arXiv:2312.06795", density=0.9),
    "ram": MergeMethod(ram, paper="arXiv:2601.13572"),
    "keyed": MergeMethod(keyed, paper="arXiv:2212.09849"),
}


def elect_signs(deltas_KDF: Tensor) -> Tensor:
    """Sign with the larger total magnitude; 0 where the shards cancel exactly (arXiv:2306.01708, Alg. 1)."""
    return deltas_KDF.sum(dim=0).sign()


def disjoint_mean(deltas_KDF: Tensor, signs_DF: Tensor) -> Tensor:
    """Mean over the shards that agree with the elected sign; shards that are zero there do not count."""
    agrees_KDF = (deltas_KDF.sign() == signs_DF) & (deltas_KDF != 0)
    return (deltas_KDF * agrees_KDF).sum(dim=0) / agrees_KDF.sum(dim=0).clamp(min=1)


def _dare(given: MergeInput) -> Tensor:
    return drop_and_rescale(given.deltas_KDF, density=given.density, seed=given.seed, shards_K=given.shards_K)
