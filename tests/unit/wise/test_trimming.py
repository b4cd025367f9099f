"""What a merge leaves out: shares of the trained entries, and nothing biased where the paper promises that."""

from collections.abc import Callable

import pytest
import torch

from pipeline.wise.masks import subspace_mask
from pipeline.wise.trimming import Range, crumbs, drop_and_rescale, largest, mag_prune, trim
from tests.whole_shards import Rows

SHAPE = (256, 512)


@pytest.fixture(scope="module")
def masked() -> tuple[torch.Tensor, torch.Tensor]:
    """Two shards with overlapping masks of density 0.2, and deltas of which no entry is zero inside them."""
    masks = torch.stack([subspace_mask(SHAPE, seed=3, shard=k, density=0.2, disjoint=False) for k in (0, 1)])
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)) * masks, masks


def trimmed(deltas: torch.Tensor, masks: torch.Tensor, kept: Callable[..., Range], *, density: float) -> torch.Tensor:
    ranges = [kept(delta[mask].abs(), density=density) for delta, mask in zip(deltas, masks, strict=True)]
    return trim(deltas, ranges)


def share_kept(pruned: torch.Tensor, masks: torch.Tensor) -> float:
    return float(pruned[masks].ne(0).float().mean())


@pytest.mark.parametrize("density", [0.1, 0.53, 1.0])
def test_densities_count_trained_entries_only(masked: tuple[torch.Tensor, torch.Tensor], density: float) -> None:
    """The standard deviation of the share of 52,000 Bernoulli draws is at most 0.0022."""
    deltas, masks = masked
    chance = {"density": density, "seed": 1, "indices_K": [0, 1]}
    assert abs(share_kept(trimmed(deltas, masks, largest, density=density), masks) - density) < 1e-4
    assert abs(share_kept(trimmed(deltas, masks, crumbs, density=density), masks) - density) < 1e-4
    assert abs(share_kept(drop_and_rescale(Rows(0, deltas, masks), **chance), masks) - density) < 0.011
    assert abs(share_kept(mag_prune(Rows(0, deltas, masks), **chance), masks) - density) < 0.011


def test_half_of_four_trained_entries_is_two() -> None:
    delta = torch.zeros(1, 5, 7)
    delta[0, 0, :4] = torch.tensor([4.0, -3.0, 2.0, 1.0])
    assert trimmed(delta, delta != 0, largest, density=0.5)[0, 0, :4].tolist() == [4.0, -3.0, 0.0, 0.0]


def test_breadcrumbs_leave_out_outliers_and_small_entries() -> None:
    delta = torch.arange(1.0, 201.0).reshape(1, 10, 20)
    kept = trimmed(delta, delta > 0, crumbs, density=0.5)
    assert sorted(kept[kept != 0].tolist()) == list(map(float, range(99, 199)))  # 2 outliers, 98 too small


def test_what_is_dropped_is_made_up_for_on_average(masked: tuple[torch.Tensor, torch.Tensor]) -> None:
    """DARE and MagPrune promise that the mean stays: over 200 seeds, a sum over many entries is the undropped one's."""
    deltas, masks = masked[0][:, :16].abs(), masked[1][:, :16]
    whole = float(deltas.sum())
    for pruned in (
        [drop_and_rescale(Rows(0, deltas, masks), density=0.3, seed=seed, indices_K=[0, 1]) for seed in range(200)],
        [mag_prune(Rows(0, deltas, masks), density=0.3, seed=seed, indices_K=[0, 1]) for seed in range(200)],
    ):
        sums = torch.tensor([float(one.sum()) for one in pruned])
        assert abs(float(sums.mean()) - whole) < 5 * float(sums.std()) / 200**0.5


def test_magprune_keeps_large_entries_more_often(masked: tuple[torch.Tensor, torch.Tensor]) -> None:
    deltas, masks = masked
    pruned = mag_prune(Rows(0, deltas, masks), density=0.5, seed=2, indices_K=[0, 1])
    large = deltas.abs() > deltas[masks].abs().median()
    assert share_kept(pruned, masks & large) > 0.53 > 0.47 > share_kept(pruned, masks & ~large)


def test_shards_and_masks_draw_apart_from_each_other(masked: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Overlapping masks come from the same generator and seed: what is dropped must not depend on them."""
    ones = torch.ones(2, *SHAPE)
    kept = drop_and_rescale(Rows(0, ones, ones != 0), density=0.5, seed=3, indices_K=[0, 1]) != 0
    assert abs(float((kept[0] & kept[1]).float().mean()) - 0.25) < 0.01
    for mask in masked[1]:
        assert abs(float(kept[0][mask].float().mean()) - 0.5) < 0.02
