"""What a merge leaves out of each shard before it combines them: trim, drop and rescale, MagPrune, breadcrumbs.

A density always counts the *trained* entries of a shard: counted over all entries, a density of 0.53 would leave
nothing out of a 20 % mask. At density 1 nothing is left out. Random choices come from the generator of the masks, in
streams of their own, and belong to the entry and to the shard's index in its memory: neither the order in which shards
arrive nor the size of the row blocks changes them.

Shape letters: K shards, R rows of a block, F d_ff, E entries.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from pipeline.wise.masks import uniform
from pipeline.wise.row_blocks import RowBlock

DROP_STREAM = 2**32  # the streams below it draw the masks
DELLA_HALF_WINDOW = 0.1  # ε / 2: a row's smallest entry is kept so much less often than the density, its largest more
BREADCRUMBS_OUTLIERS = 0.01  # γ: share of the trained entries that are outliers

Range = tuple[float, float]  # of magnitudes, both ends included
ALL: Range = (0.0, float("inf"))


def largest(magnitudes_E: Tensor, *, density: float) -> Range:
    """What trim keeps of a shard: its largest entries by magnitude (Ties-Merge, arXiv:2306.01708). Ties at the
    threshold are all kept. Sorts the magnitudes as far as it must."""
    count = max(1, round(density * len(magnitudes_E)))
    if count >= len(magnitudes_E):
        return ALL
    first = len(magnitudes_E) - count
    ranked_E = magnitudes_E.numpy()
    ranked_E.partition(first)
    return float(ranked_E[first]), float("inf")


def crumbs(magnitudes_E: Tensor, *, density: float) -> Range:
    """What Model Breadcrumbs keep of a shard (arXiv:2312.06795): they leave out the largest entries, γ of them, and
    then the smallest until the density is reached. Where the density alone leaves out less than γ, only so many
    outliers go. Entries as large as one that stays do stay. Sorts the magnitudes as far as it must."""
    count = max(1, round(density * len(magnitudes_E)))
    if count >= len(magnitudes_E):
        return ALL
    outliers = min(round(BREADCRUMBS_OUTLIERS * len(magnitudes_E)), len(magnitudes_E) - count)
    last = len(magnitudes_E) - outliers - 1
    first = last - count + 1
    ranked_E = magnitudes_E.numpy()
    ranked_E.partition((first, last))
    return float(ranked_E[first]), float(ranked_E[last])


def trim(deltas_KRF: Tensor, ranges_K: Sequence[Range]) -> Tensor:
    """Keep the entries whose magnitude lies in their shard's range."""
    return torch.stack([_trimmed(delta_RF, *kept) for delta_RF, kept in zip(deltas_KRF, ranges_K, strict=True)])


def drop_and_rescale(block: RowBlock, *, density: float, seed: int, indices_K: Sequence[int]) -> Tensor:
    """DARE (arXiv:2311.03099): drop each entry with probability 1 − density, divide what stays by the density."""
    kept_KRF = _draws(block, seed=seed, indices_K=indices_K) < density
    return block.deltas_KRF * kept_KRF / density


def mag_prune(block: RowBlock, *, density: float, seed: int, indices_K: Sequence[int]) -> Tensor:
    """MagPrune (DELLA, arXiv:2406.11617): as DARE, but the larger an entry among the trained ones of its matrix row,
    the likelier it stays. What stays is divided by its own probability.

    Rank r = 0…n−1, smallest first, is kept with probability p = density − h + 2h · (r + ½) / n: on average a row keeps
    the density. The half window h is DELLA_HALF_WINDOW, or less where p would leave (0, 1).
    """
    half_window = min(DELLA_HALF_WINDOW, 1 - density, density / 2)
    magnitudes_KRF = torch.where(block.trained_KRF, block.deltas_KRF.abs(), torch.inf)  # untrained entries rank behind
    ranks_KRF = magnitudes_KRF.argsort(dim=-1, stable=True).argsort(dim=-1).double()
    trained_KR1 = block.trained_KRF.sum(dim=-1, keepdim=True).clamp(min=1)
    keep_KRF = density - half_window + 2 * half_window * ((ranks_KRF + 0.5) / trained_KR1).clamp(max=1)
    kept_KRF = _draws(block, seed=seed, indices_K=indices_K) < keep_KRF
    return (block.deltas_KRF * kept_KRF / keep_KRF).to(block.deltas_KRF.dtype)


def _trimmed(delta_RF: Tensor, least: float, most: float) -> Tensor:
    # hardshrink leaves out what is at most λ, in one pass: λ is the next smaller number.
    delta_RF = hardshrink(delta_RF, float(np.nextafter(np.float32(least), np.float32(0))))
    return delta_RF if most == float("inf") else torch.where(delta_RF.abs() <= most, delta_RF, 0)


def _draws(block: RowBlock, *, seed: int, indices_K: Sequence[int]) -> Tensor:
    shape = (block.deltas_KRF.shape[1], block.deltas_KRF.shape[2])
    streams = [DROP_STREAM + index for index in indices_K]
    return torch.stack([uniform(shape, seed=seed, stream=stream, first_row=block.first_row) for stream in streams])
