"""Subspace masks: seeded Bernoulli(ρ) choices with bits that must never change."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.wise.masks import subspace_mask


@given(seed=st.integers(0, 2**32), shards=st.integers(1, 5))
def test_disjoint_masks_never_share_an_entry_and_together_cover_their_share(seed: int, shards: int) -> None:
    masks = [subspace_mask((64, 128), seed=seed, shard=k, density=1 / shards, disjoint=True) for k in range(shards)]
    moved_by = torch.stack(masks).sum(dim=0)
    assert int(moved_by.max()) == 1
    assert float((moved_by == 1).float().mean()) > 0.999


def test_density_is_the_share_of_entries() -> None:
    for disjoint in (True, False):
        mask = subspace_mask((256, 512), seed=3, shard=1, density=0.2, disjoint=disjoint)
        # Standard deviation of the share of 131,072 Bernoulli(0.2) draws is 0.0011.
        assert abs(float(mask.float().mean()) - 0.2) < 0.006


def test_overlapping_masks_are_independent() -> None:
    first, second = (subspace_mask((256, 512), seed=3, shard=k, density=0.5, disjoint=False) for k in (0, 1))
    assert abs(float((first & second).float().mean()) - 0.25) < 0.01


@given(columns=st.integers(1, 9), shard=st.integers(0, 3), disjoint=st.booleans(), block_rows=st.integers(1, 12))
def test_a_block_of_rows_is_that_of_the_whole_mask(columns: int, shard: int, disjoint: bool, block_rows: int) -> None:
    given_ = {"seed": 5, "shard": shard, "density": 0.25, "disjoint": disjoint}
    blocks = [
        subspace_mask((min(block_rows, 12 - row), columns), **given_, first_row=row) for row in range(0, 12, block_rows)
    ]
    assert torch.equal(torch.cat(blocks), subspace_mask((12, columns), **given_))


def test_the_bits_are_those_of_the_philox_paper() -> None:
    """A mask is stored as its seed, so its bits may never change. Independent oracle: Philox4x64-10 in plain integers
    (Salmon et al., SC 2011)."""
    mask = subspace_mask((4, 8), seed=12345, shard=2, density=0.3, disjoint=False)
    draws = np.array([(word >> 11) * 2.0**-53 for block in range(8) for word in _philox(block + 1, 12345, 3)])
    assert torch.equal(mask, torch.from_numpy(draws.reshape(4, 8) < 0.3))


def _philox(counter: int, key0: int, key1: int) -> list[int]:
    full = 2**64 - 1
    c = [counter, 0, 0, 0]
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * c[2], 2**64)
        c = [high1 ^ c[1] ^ key0, low1, high0 ^ c[3] ^ key1, low0]
        key0, key1 = (key0 + 0x9E3779B97F4A7C15) & full, (key1 + 0xBB67AE8584CAA73B) & full
    return c
