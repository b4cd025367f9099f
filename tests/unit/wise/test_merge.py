"""Merge methods against small oracles that share no code with them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.wise.merge import METHODS, MergeInput, disjoint_mean, elect_signs, trim

K, D, F = 3, 5, 7


def merge_input(seed: int, *, shards: int = K, density: float = 1.0, ridge: float = 1.0, keys: int = 4) -> MergeInput:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(shards, D, F, generator=generator) < 0.6
    return MergeInput(
        deltas_KDF=torch.randn(shards, D, F, generator=generator) * masks,
        trained_KDF=masks,
        keys_NF=[torch.randn(keys + k, F, generator=generator) for k in range(shards)],
        ties_density=density,
        keyed_ridge=ridge,
    )


def ties_entry_by_entry(given_: MergeInput) -> np.ndarray:
    """Ties-Merge by loops over entries, as the paper's text reads."""
    deltas, masks = given_.deltas_KDF.numpy().copy(), given_.trained_KDF.numpy()
    for delta, mask in zip(deltas, masks, strict=True):
        trained = sorted((abs(delta[i]) for i in zip(*np.nonzero(mask), strict=True)), reverse=True)
        keep = max(1, round(given_.ties_density * len(trained)))
        delta[np.abs(delta) < trained[keep - 1]] = 0
    merged = np.zeros((D, F), dtype=np.float32)
    for i in np.ndindex(D, F):
        column = [float(delta[i]) for delta in deltas]
        positive, negative = sum(v for v in column if v > 0), -sum(v for v in column if v < 0)
        agreeing = [v for v in column if (v > 0 if positive > negative else v < 0)] if positive != negative else []
        merged[i] = sum(agreeing) / len(agreeing) if agreeing else 0
    return merged


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), density=st.sampled_from([0.2, 0.53, 0.9, 1.0]))
def test_ties_is_the_paper_entry_by_entry(seed: int, density: float) -> None:
    given_ = merge_input(seed, density=density)
    np.testing.assert_allclose(METHODS["ties"].merge(given_).numpy(), ties_entry_by_entry(given_), atol=1e-6)


@pytest.mark.parametrize("keys", [1, 9], ids=["fewer keys than columns", "more keys than columns"])
def test_keyed_is_the_least_squares_solution(keys: int) -> None:
    """Oracle: the same ridge problem as an ordinary least-squares one with √λ·I stacked below the keys."""
    given_ = merge_input(1, keys=keys, ridge=0.7)
    rows = np.concatenate([k.numpy() for k in given_.keys_NF] + [np.sqrt(0.7) * np.eye(F)])
    wanted = [(k.double() @ d.double().T).numpy() for k, d in zip(given_.keys_NF, given_.deltas_KDF, strict=True)]
    solution, *_ = np.linalg.lstsq(rows, np.concatenate([*wanted, np.zeros((F, D))]), rcond=None)
    np.testing.assert_allclose(METHODS["keyed"].merge(given_).numpy(), solution.T, atol=1e-5)


def test_keyed_answers_every_shards_keys_as_that_shard_when_there_is_room() -> None:
    given_ = merge_input(5, shards=2, keys=2, ridge=1e-9)  # 2 + 3 keys in 7 dimensions
    merged_DF = METHODS["keyed"].merge(given_)
    for keys_NF, delta_DF in zip(given_.keys_NF, given_.deltas_KDF, strict=True):
        torch.testing.assert_close(keys_NF @ merged_DF.T, keys_NF @ delta_DF.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_arrival_order_does_not_matter(name: str) -> None:
    given_ = merge_input(2, density=0.5)
    turned = [2, 0, 1]
    other = MergeInput(
        deltas_KDF=given_.deltas_KDF[turned],
        trained_KDF=given_.trained_KDF[turned],
        keys_NF=[given_.keys_NF[k] for k in turned],
        ties_density=0.5,
        keyed_ridge=1.0,
    )
    torch.testing.assert_close(METHODS[name].merge(given_), METHODS[name].merge(other), atol=1e-6, rtol=1e-5)


def test_one_shard_at_density_one_is_the_identity() -> None:
    given_ = merge_input(3, shards=1)
    assert torch.equal(METHODS["ties"].merge(given_), given_.deltas_KDF[0])


@given(seed=st.integers(0, 10_000))
def test_disjoint_shards_are_simply_added(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(K, (D, F), generator=generator)
    masks = torch.stack([owner == k for k in range(K)])
    deltas = torch.randn(K, D, F, generator=generator) * masks
    assert torch.equal(disjoint_mean(deltas, elect_signs(deltas)), deltas.sum(dim=0))


def test_density_counts_trained_entries_only() -> None:
    """0.5 of a mask of 4 entries keeps 2; counted over all 35 entries it would keep everything."""
    delta = torch.zeros(1, D, F)
    delta[0, 0, :4] = torch.tensor([4.0, -3.0, 2.0, 1.0])
    kept: Tensor = trim(delta, delta != 0, density=0.5)
    assert kept[0, 0, :4].tolist() == [4.0, -3.0, 0.0, 0.0]


def test_exact_cancellation_elects_nothing() -> None:
    deltas = torch.tensor([[[2.0]], [[-2.0]]])
    assert elect_signs(deltas).item() == 0
    assert disjoint_mean(deltas, elect_signs(deltas)).item() == 0
