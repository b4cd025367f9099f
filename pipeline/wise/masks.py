"""Subspace masks: which entries of the side memory a shard may move (WISE §2.3.1, "random gradient masks").

Every entry gets a draw u ∈ [0, 1) from a raw counter-based generator. NumPy keeps the bits of Philox stable across
versions (only its distributions may change), so a mask is stored as its seed.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def subspace_mask(
    shape: tuple[int, int], *, seed: int, shard: int, density: float, disjoint: bool, first_row: int = 0
) -> Tensor:
    """Boolean D × F mask, true for a Bernoulli(ρ) share of the entries; or a block of its rows, from `first_row` on.

    Overlapping masks (the paper) draw afresh for each shard. Disjoint masks share one draw: shard j of a memory owns
    the entries with u ∈ [jρ, (j+1)ρ), so that up to 1/ρ shards never move the same entry.
    """
    low = shard * density if disjoint else 0.0
    assert low + density <= 1 + 1e-9, "disjoint masks do not fit; the config refuses this"
    words = _words(shape, seed=seed, stream=0 if disjoint else 1 + shard, first_row=first_row)
    # What comparing the fractions u gives, in a third of the time: u ≥ low where the word is at least low's.
    first, last = (np.uint64(word) for word in (_word(low), _word(min(low + density, 1.0)) - 1))
    return torch.from_numpy((words >= first) & (words <= last))


def uniform(shape: tuple[int, int], *, seed: int, stream: int, first_row: int = 0) -> Tensor:
    """Draws u ∈ [0, 1) of 53 bits as float64, row by row; another stream is another, independent matrix of draws."""
    return torch.from_numpy((_words(shape, seed=seed, stream=stream, first_row=first_row) >> 11) * 2.0**-53)


def _words(shape: tuple[int, int], *, seed: int, stream: int, first_row: int) -> NDArray[np.uint64]:
    """The generator's words of some rows: 53 bits of u above 11 that do not count. An entry's word depends on its place
    in the whole matrix alone."""
    rows, columns = shape
    counter, skipped = divmod(first_row * columns, 4)  # Philox makes four words at a time
    words = np.random.Philox(key=[seed, stream], counter=counter).random_raw(skipped + rows * columns)
    return words[skipped:].reshape(shape)


def _word(fraction: float) -> int:
    """The smallest word whose u is at least this."""
    return math.ceil(fraction * 2**53) << 11
