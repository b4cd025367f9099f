"""Subspace masks: which entries of the side memory a shard may move (WISE §2.3.1, "random gradient masks").

Every entry gets a draw u ∈ [0, 1) from a raw counter-based generator. NumPy keeps the bits of Philox stable across
versions (only its distributions may change), so a mask is stored as its seed.
"""

import numpy as np
import torch
from torch import Tensor


def subspace_mask(shape: tuple[int, int], *, seed: int, shard: int, density: float, disjoint: bool) -> Tensor:
    """Boolean D × F mask, true for a Bernoulli(ρ) share of the entries.

    Overlapping masks (the paper) draw afresh for each shard. Disjoint masks share one draw: shard j of a memory owns
    the entries with u ∈ [jρ, (j+1)ρ), so that up to 1/ρ shards never move the same entry.
    """
    draw = uniform(shape, seed=seed, stream=0 if disjoint else 1 + shard)
    low = shard * density if disjoint else 0.0
    assert low + density <= 1 + 1e-9, "disjoint masks do not fit; the config refuses this"
    return (draw >= low) & (draw < low + density)


def uniform(shape: tuple[int, int], *, seed: int, stream: int) -> Tensor:
    """Draws from [0, 1) of 53 bits as float64, row by row; another stream is another, independent matrix of draws."""
    bits = np.random.Philox(key=[seed, stream]).random_raw(shape[0] * shape[1])
    return torch.from_numpy(((bits >> 11) * 2.0**-53).reshape(shape))
