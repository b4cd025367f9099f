"""What a merge leaves out of each shard before it combines them: trim, drop and rescale, MagPrune, breadcrumbs.

A density always counts the *trained* entries of a shard: counted over all entries, a density of 0.53 would leave
nothing out of a 20 % mask. At density 1 nothing is left out. Random choices come from the generator of the masks, in
streams of their own, and belong to the shard's index in its memory: the order in which shards arrive changes nothing.

Shape letters: K shards, D d_model, F d_ff.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.wise.masks import uniform

DROP_STREAM = 2**32  # the streams below it draw the masks
DELLA_HALF_WINDOW = 0.1  # ε / 2: a row's smallest entry is kept so much less often than the density, its largest more
BREADCRUMBS_OUTLIERS = 0.01  # γ: share of the trained entries that are outliers


def trim(deltas_KDF: Tensor, trained_KDF: Tensor, *, density: float) -> Tensor:
    """Keep each shard's largest entries by magnitude (Ties-Merge, arXiv:2306.01708). Ties at the threshold are all
    kept."""
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


def drop_and_rescale(deltas_KDF: Tensor, *, density: float, seed: int, shards_K: Sequence[int]) -> Tensor:
    """DARE (arXiv:2311.03099): drop each entry with probability 1 − density, divide what stays by the density."""
    kept_KDF = _draws(deltas_KDF, seed=seed, shards_K=shards_K) < density
    return deltas_KDF * kept_KDF / density


def mag_prune(deltas_KDF: Tensor, trained_KDF: Tensor, *, density: float, seed: int, shards_K: Sequence[int]) -> Tensor:
    """MagPrune (DELLA, arXiv:2406.11617): as DARE, but the larger an entry among the trained ones of its matrix row,
    the likelier it stays. What stays is divided by its own probability.

    Rank r = 0…n−1, smallest first, is kept with probability p = density − h + 2h · (r + ½) / n: on average a row keeps
    the density. The half window h is DELLA_HALF_WINDOW, or less where p would leave (0, 1).
    """
    half_window = min(DELLA_HALF_WINDOW, 1 - density, density / 2)
    magnitudes_KDF = torch.where(trained_KDF, deltas_KDF.abs(), torch.inf)  # untrained entries rank behind
    ranks_KDF = magnitudes_KDF.argsort(dim=-1, stable=True).argsort(dim=-1).double()
    trained_KD1 = trained_KDF.sum(dim=-1, keepdim=True).clamp(min=1)
    keep_KDF = density - half_window + 2 * half_window * ((ranks_KDF + 0.5) / trained_KD1).clamp(max=1)
    kept_KDF = _draws(deltas_KDF, seed=seed, shards_K=shards_K) < keep_KDF
    return (deltas_KDF * kept_KDF / keep_KDF).to(deltas_KDF.dtype)


def breadcrumbs_of(deltas_KDF: Tensor, trained_KDF: Tensor, *, density: float) -> Tensor:
    """Model Breadcrumbs (arXiv:2312.06795): leave out the largest entries, γ of them, and then the smallest until the
    density is reached. Where the density alone leaves out less than γ, only so many outliers go. Entries as large as
    one that stays do stay."""
    kept = []
    for delta_DF, trained_DF in zip(deltas_KDF, trained_KDF, strict=True):
        ranked = delta_DF[trained_DF].abs().sort().values
        count = max(1, round(density * ranked.numel()))
        if count >= ranked.numel():
            kept.append(delta_DF)
            continue
        outliers = min(round(BREADCRUMBS_OUTLIERS * ranked.numel()), ranked.numel() - count)
        last = ranked.numel() - outliers
        magnitude_DF = delta_DF.abs()
        stays_DF = (magnitude_DF >= ranked[last - count]) & (magnitude_DF <= ranked[last - 1])
        kept.append(torch.where(stays_DF, delta_DF, 0))
    return torch.stack(kept)


def _draws(deltas_KDF: Tensor, *, seed: int, shards_K: Sequence[int]) -> Tensor:
    D, F = deltas_KDF.shape[1:]
    return torch.stack([uniform((D, F), seed=seed, stream=DROP_STREAM + shard) for shard in shards_K])
