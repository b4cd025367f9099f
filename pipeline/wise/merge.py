"""Merge K shard deltas into one side memory: one row of METHODS per method, each stage named after the paper's step.

The deltas flow through in blocks of rows. A method is a function that first finds out what a block alone does not show
(thresholds, norms, a factorised matrix) and returns the function that merges one block. So any block size gives the
same matrix, and no more than the blocks are held.

What a method leaves out of each shard first is in trimming.py. None of the scaling factors that the papers tune on
held-out data (λ, α, weights) is an option here: they are 1, and each row says what that means.

Shape letters: K shards, D d_model, R rows of a block, F d_ff, N keys.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.wise.row_blocks import RowBlock, Shards
from pipeline.wise.trimming import Range, crumbs, drop_and_rescale, largest, mag_prune, trim

RAM_RESCALE = 0.2  # r; with RAM_MOST the authors' published run (a rescale factor of 1.2)
RAM_MOST = 1.0  # α

MergeBlock = Callable[[RowBlock], Tensor]  # → R × F


@dataclass(frozen=True)
class MergeOptions:
    """`density` is the share of a shard's trained entries that trimming keeps. The seed and each shard's index in its
    memory choose what is dropped at random."""

    seed: int
    density: float
    keyed_ridge: float
    threads: int = 1


@dataclass(frozen=True)
class MergeMethod:
    """`density` is what `merge.density: auto` means. Of disjoint shards trained with the sibling penalty, leaving
    entries out only lost edits, most at the 0.53 that WISE's reference implementation publishes (docs/experiments.md).
    So Ties trims nothing, and the methods that are a way of leaving out leave out a tenth."""

    prepare: Callable[[Shards, MergeOptions], MergeBlock]
    paper: str
    density: float = 1.0


def merge(method: str, shards: Shards, options: MergeOptions) -> Iterator[Tensor]:
    """Blocks of rows (R × F, float32) of the merged matrix, from the top."""
    merge_block = METHODS[method].prepare(shards, options)
    ahead: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(options.threads) as pool:
        for block in shards.blocks():
            ahead.append(pool.submit(merge_block, block))
            if len(ahead) > options.threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def linear(shards: Shards, options: MergeOptions) -> MergeBlock:
    """Plain mean over the shards, as of model soups (arXiv:2203.05482). An entry that one shard alone moved shrinks to
    1/K."""
    return lambda block: block.deltas_KRF.mean(dim=0)


def task_sum(shards: Shards, options: MergeOptions) -> MergeBlock:
    """Task arithmetic: Σ_k ΔW_k (arXiv:2212.04089, with λ = 1). With disjoint masks every shard stays as it is."""
    return lambda block: block.deltas_KRF.sum(dim=0)


def slerp(shards: Shards, options: MergeOptions) -> MergeBlock:
    """Spherical mean: Σ_k ΔW_k / ‖Σ_k u_k‖ with u_k = ΔW_k / ‖ΔW_k‖ (Frobenius).

    For two shards this is Shoemake's interpolation (SIGGRAPH 1985) half way, (v_0 + v_1) · sin(θ/2) / sin θ. It is
    defined for two; interpolating one shard after another would make the last one weigh more, so for K > 2 the same
    formula goes on, in which the order does not matter. Parallel shards give their mean, orthogonal ones (disjoint
    masks) Σ / √K. Where the directions cancel there is no spherical mean, and the plain one is returned.
    """
    K = len(shards.indices_K)
    products_KK = torch.zeros(K, K, dtype=torch.float64)  # ⟨ΔW_k, ΔW_l⟩
    for block in shards.blocks():
        entries_KE = block.deltas_KRF.flatten(start_dim=1).double()
        products_KK += entries_KE @ entries_KE.T
    norms_K = products_KK.diagonal().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    length = float((products_KK / norms_K / norms_K[:, None]).sum().clamp(min=0).sqrt())
    return linear(shards, options) if length < 1e-6 else lambda block: block.deltas_KRF.sum(dim=0) / length


def sign(shards: Shards, options: MergeOptions) -> MergeBlock:
    """Ties-Merge without its trim: elect, disjoint mean. `sign` in WISE's reference implementation."""
    return lambda block: disjoint_mean(block.deltas_KRF, elect_signs(block.deltas_KRF))


def ties(shards: Shards, options: MergeOptions) -> MergeBlock:
    """Ties-Merge: trim, elect, disjoint mean (arXiv:2306.01708, Alg. 1). WISE's default (§2.3.2)."""
    if options.density == 1:
        return sign(shards, options)
    kept_K = _ranges(shards, options, largest)

    def merge_block(block: RowBlock) -> Tensor:
        trimmed_KRF = trim(block.deltas_KRF, kept_K)
        return disjoint_mean(trimmed_KRF, elect_signs(trimmed_KRF))

    return merge_block


def dare_linear(shards: Shards, options: MergeOptions) -> MergeBlock:
    """DARE, then the plain mean (arXiv:2311.03099). The reference implementation of WISE does not rescale here; the
    paper does."""
    return lambda block: _dare(block, shards, options).mean(dim=0)


def dare_ties(shards: Shards, options: MergeOptions) -> MergeBlock:
    """DARE in place of Ties-Merge's trim (arXiv:2311.03099, §3.3): drop and rescale, elect, disjoint mean."""

    def merge_block(block: RowBlock) -> Tensor:
        dropped_KRF = _dare(block, shards, options)
        return disjoint_mean(dropped_KRF, elect_signs(dropped_KRF))

    return merge_block


def della(shards: Shards, options: MergeOptions) -> MergeBlock:
    """DELLA: drop by MagPrune, elect, fuse by the disjoint mean (arXiv:2406.11617, with λ = 1)."""

    def merge_block(block: RowBlock) -> Tensor:
        pruned_KRF = mag_prune(block, density=options.density, seed=options.seed, indices_K=shards.indices_K)
        return disjoint_mean(pruned_KRF, elect_signs(pruned_KRF))

    return merge_block


def breadcrumbs(shards: Shards, options: MergeOptions) -> MergeBlock:
    """Model Breadcrumbs: Σ_k m_k ⊙ ΔW_k, the masks leaving out outliers and small entries (arXiv:2312.06795, with
    α = 1)."""
    kept_K = _ranges(shards, options, crumbs)
    return lambda block: trim(block.deltas_KRF, kept_K).sum(dim=0)


def ram(shards: Shards, options: MergeOptions) -> MergeBlock:
    """Reinforced Agent Merging (arXiv:2601.13572, RAM+): entries that several shards moved are averaged over those
    shards, entries that one shard alone moved are kept and scaled by λ_k = 1 + r · min(ρ_k, α).

    ρ_k is how many of shard k's entries are shared for each that is its own: what averaging takes from a shard, its own
    entries give back. Moved means non-zero; the paper compares with 1e-5, since its models have no masks.
    """
    shared_K = own_K = torch.zeros(len(shards.indices_K), dtype=torch.int64)
    for block in shards.blocks():
        moved_KRF = block.deltas_KRF != 0
        movers_RF = moved_KRF.sum(dim=0)
        shared_K = shared_K + (moved_KRF & (movers_RF > 1)).sum(dim=(1, 2))
        own_K = own_K + (moved_KRF & (movers_RF == 1)).sum(dim=(1, 2))
    scale_K = 1 + RAM_RESCALE * (shared_K / own_K.clamp(min=1)).clamp(max=RAM_MOST)

    def merge_block(block: RowBlock) -> Tensor:
        movers_RF = (block.deltas_KRF != 0).sum(dim=0)
        kept_RF = (block.deltas_KRF * scale_K[:, None, None]).sum(dim=0)
        averaged_RF = block.deltas_KRF.sum(dim=0) / movers_RF.clamp(min=1)
        return torch.where(movers_RF == 1, kept_RF, averaged_RF)

    return merge_block


def keyed(shards: Shards, options: MergeOptions) -> MergeBlock:
    """The matrix that answers each shard's own keys as that shard does.

    ΔW = argmin Σ_k ‖(ΔW − ΔW_k) A_k‖² + λ‖ΔW‖², the regression mean of arXiv:2212.09849 on the shards' own keys with a
    ridge towards zero. With keys as the rows of A it is Σ_k ΔW_k A_kᵀ S_k: additive over shards and row by row, where
    S = (A Aᵀ + λ)⁻¹ A = A (Aᵀ A + λ)⁻¹ is solved by Cholesky in the smaller of the two forms, in float64.
    """
    keys_NF = [shards.keys_NF(k).double() for k in range(len(shards.indices_K))]
    solved_NF = torch.split(_solved(torch.cat(keys_NF), options.keyed_ridge), [len(keys) for keys in keys_NF])

    def merge_block(block: RowBlock) -> Tensor:
        merged_RF = torch.zeros(block.deltas_KRF.shape[1:], dtype=torch.float64)
        for delta_RF, keys, solved in zip(block.deltas_KRF.double(), keys_NF, solved_NF, strict=True):
            merged_RF += (delta_RF @ keys.T) @ solved
        return merged_RF.float()

    return merge_block


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


def elect_signs(deltas_KRF: Tensor) -> Tensor:
    """Sign with the larger total magnitude; 0 where the shards cancel exactly (arXiv:2306.01708, Alg. 1)."""
    return deltas_KRF.sum(dim=0).sign()


def disjoint_mean(deltas_KRF: Tensor, signs_RF: Tensor) -> Tensor:
    """Mean over the shards that agree with the elected sign; shards that are zero there do not count."""
    agreeing_KRF = (deltas_KRF * signs_RF).clamp_(min=0)  # magnitudes
    total_RF = agreeing_KRF.sum(dim=0) * signs_RF
    return total_RF / agreeing_KRF.sign_().sum(dim=0).clamp_(min=1)


def _ranges(shards: Shards, options: MergeOptions, kept: Callable[..., Range]) -> list[Range]:
    """Which magnitudes stay of each shard; as many shards are held at a time as there are threads."""
    with ThreadPoolExecutor(options.threads) as pool:
        return list(
            pool.map(lambda k: kept(shards.magnitudes_E(k), density=options.density), range(len(shards.indices_K)))
        )


def _dare(block: RowBlock, shards: Shards, options: MergeOptions) -> Tensor:
    return drop_and_rescale(block, density=options.density, seed=options.seed, indices_K=shards.indices_K)


def _solved(keys_NF: Tensor, ridge: float) -> Tensor:
    """(A Aᵀ + λ)⁻¹ A, N × F; the two forms are equal (push-through identity)."""
    N, F = keys_NF.shape
    if N <= F:
        gram_NN = keys_NF @ keys_NF.T
        gram_NN.diagonal().add_(ridge)
        return torch.cholesky_solve(keys_NF, torch.linalg.cholesky(gram_NN))
    gram_FF = keys_NF.T @ keys_NF
    gram_FF.diagonal().add_(ridge)
    return torch.cholesky_solve(keys_NF.T, torch.linalg.cholesky(gram_FF)).T
