"""Merge methods against small oracles that share no code with them: plain loops over entries."""

import dataclasses
import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import MergeSection
from pipeline.wise.merge import METHODS, disjoint_mean, elect_signs
from tests.whole_shards import MergeInput, merged

K, D, F = 3, 5, 7
DENSITIES = st.sampled_from([0.05, 0.2, 0.53, 0.9, 0.995, 1.0])

Entry = tuple[int, int]
Shards = list[dict[Entry, float]]  # the trained entries of each shard


def merge_input(
    seed: int,
    *,
    shards: int = K,
    density: float = 1.0,
    ridge: float = 1.0,
    keys: int = 4,
    disjoint: bool = False,
    block_rows: int = 2,
) -> MergeInput:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(shards, D, F, generator=generator) < 0.6
    if disjoint:
        owner = torch.randint(shards, (D, F), generator=generator)
        masks = torch.stack([owner == k for k in range(shards)])
    return MergeInput(
        deltas_KDF=torch.randn(shards, D, F, generator=generator) * masks,
        trained_KDF=masks,
        keys=[torch.randn(keys + k, F, generator=generator) for k in range(shards)],
        indices_K=[5 * k for k in range(shards)],
        seed=seed,
        density=density,
        keyed_ridge=ridge,
        block_rows=block_rows,
    )


def as_shards(given_: MergeInput) -> Shards:
    return [
        {(i, j): float(delta[i, j]) for i, j in np.ndindex(D, F) if mask[i, j]}
        for delta, mask in zip(given_.deltas_KDF, given_.trained_KDF, strict=True)
    ]


def by_entry(shards: Shards, combine: Callable[[list[float]], float]) -> np.ndarray:
    """`combine` gets what every shard says at an entry, zeros included."""
    merged = np.zeros((D, F))
    for entry in np.ndindex(D, F):
        merged[entry] = combine([shard.get(entry, 0.0) for shard in shards])  # type: ignore[call-overload]
    return merged


def elected_mean(column: list[float]) -> float:
    positive, negative = sum(v for v in column if v > 0), -sum(v for v in column if v < 0)
    agreeing = [v for v in column if (v > 0 if positive > negative else v < 0)] if positive != negative else []
    return sum(agreeing) / len(agreeing) if agreeing else 0.0


def mean(column: list[float]) -> float:
    return sum(column) / len(column)


def trimmed(shards: Shards, density: float) -> Shards:
    kept = []
    for shard in shards:
        order = sorted(shard, key=lambda entry: -abs(shard[entry]))
        kept.append({entry: shard[entry] for entry in order[: max(1, round(density * len(order)))]})
    return kept


def draws(given_: MergeInput) -> list[np.ndarray]:
    """Each shard's own stream of the generator, apart from the streams of the masks."""
    bits = [np.random.Philox(key=[given_.seed, 2**32 + shard]).random_raw(D * F) for shard in given_.indices_K]
    return [((b >> 11) * 2.0**-53).reshape(D, F) for b in bits]


def dropped(given_: MergeInput) -> Shards:
    return [
        {entry: value / given_.density for entry, value in shard.items() if draw[entry] < given_.density}
        for shard, draw in zip(as_shards(given_), draws(given_), strict=True)
    ]


def mag_pruned(given_: MergeInput) -> Shards:
    density = given_.density
    half = min(0.1, 1 - density, density / 2)
    pruned: Shards = []
    for shard, draw in zip(as_shards(given_), draws(given_), strict=True):
        pruned.append({})
        for i in range(D):
            row = sorted((entry for entry in shard if entry[0] == i), key=lambda entry: abs(shard[entry]))
            for rank, entry in enumerate(row):
                keep = density - half + 2 * half * (rank + 0.5) / len(row)
                if draw[entry] < keep:
                    pruned[-1][entry] = shard[entry] / keep
    return pruned


def crumbs(given_: MergeInput) -> Shards:
    left = []
    for shard in as_shards(given_):
        order = sorted(shard, key=lambda entry: -abs(shard[entry]))
        stay = max(1, round(given_.density * len(order)))
        outliers = min(round(0.01 * len(order)), len(order) - stay)
        left.append({entry: shard[entry] for entry in order[outliers : outliers + stay]})
    return left


def ram_entry_by_entry(given_: MergeInput) -> np.ndarray:
    shards = as_shards(given_)
    movers = {entry: sum(entry in shard for shard in shards) for entry in np.ndindex(D, F)}
    merged = np.zeros((D, F))
    for shard in shards:
        shared = sum(movers[entry] > 1 for entry in shard)
        own = len(shard) - shared
        scale = 1 + 0.2 * min(1.0, shared / max(own, 1))
        for entry, value in shard.items():
            merged[entry] += value * scale if movers[entry] == 1 else value / movers[entry]
    return merged


def slerp_entry_by_entry(given_: MergeInput) -> np.ndarray:
    shards = as_shards(given_)
    norms = [math.sqrt(sum(value**2 for value in shard.values())) for shard in shards]
    units = [{entry: value / norm for entry, value in shard.items()} for shard, norm in zip(shards, norms, strict=True)]
    length = math.sqrt(sum(sum(unit.get(entry, 0.0) for unit in units) ** 2 for entry in np.ndindex(D, F)))
    return by_entry(shards, lambda column: sum(column) / length)


ORACLES: dict[str, Callable[[MergeInput], np.ndarray]] = {
    "linear": lambda given_: by_entry(as_shards(given_), mean),
    "sum": lambda given_: by_entry(as_shards(given_), sum),
    "slerp": slerp_entry_by_entry,
    "sign": lambda given_: by_entry(as_shards(given_), elected_mean),
    "ties": lambda given_: by_entry(trimmed(as_shards(given_), given_.density), elected_mean),
    "dare_linear": lambda given_: by_entry(dropped(given_), mean),
    "dare_ties": lambda given_: by_entry(dropped(given_), elected_mean),
    "della": lambda given_: by_entry(mag_pruned(given_), elected_mean),
    "breadcrumbs": lambda given_: by_entry(crumbs(given_), sum),
    "ram": ram_entry_by_entry,
}
BY_ENTRY = sorted(ORACLES)


@pytest.mark.parametrize("name", BY_ENTRY)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), density=DENSITIES)
def test_each_method_is_its_paper_entry_by_entry(name: str, seed: int, density: float) -> None:
    given_ = merge_input(seed, density=density)
    np.testing.assert_allclose(merged(name, given_).numpy(), ORACLES[name](given_), atol=1e-5)


def test_the_config_names_exactly_the_methods_of_the_table() -> None:
    assert set(get_args(MergeSection.model_fields["method"].annotation)) == set(METHODS)
    assert {*BY_ENTRY, "keyed"} == set(METHODS)


@pytest.mark.parametrize("keys", [1, 9], ids=["fewer keys than columns", "more keys than columns"])
def test_keyed_is_the_least_squares_solution(keys: int) -> None:
    """Oracle: the same ridge problem as an ordinary least-squares one with √λ·I stacked below the keys."""
    given_ = merge_input(1, keys=keys, ridge=0.7)
    rows = np.concatenate([k.numpy() for k in given_.keys] + [np.sqrt(0.7) * np.eye(F)])
    wanted = [(k.double() @ d.double().T).numpy() for k, d in zip(given_.keys, given_.deltas_KDF, strict=True)]
    solution, *_ = np.linalg.lstsq(rows, np.concatenate([*wanted, np.zeros((F, D))]), rcond=None)
    np.testing.assert_allclose(merged("keyed", given_).numpy(), solution.T, atol=1e-5)


def test_keyed_answers_every_shards_keys_as_that_shard_when_there_is_room() -> None:
    given_ = merge_input(5, shards=2, keys=2, ridge=1e-9)  # 2 + 3 keys in 7 dimensions
    merged_DF = merged("keyed", given_)
    for keys_NF, delta_DF in zip(given_.keys, given_.deltas_KDF, strict=True):
        torch.testing.assert_close(keys_NF @ merged_DF.T, keys_NF @ delta_DF.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_arrival_order_does_not_matter(name: str) -> None:
    given_ = merge_input(2, density=0.5)
    turned = [2, 0, 1]
    other = MergeInput(
        deltas_KDF=given_.deltas_KDF[turned],
        trained_KDF=given_.trained_KDF[turned],
        keys=[given_.keys[k] for k in turned],
        indices_K=[given_.indices_K[k] for k in turned],
        seed=given_.seed,
        density=0.5,
        keyed_ridge=1.0,
    )
    torch.testing.assert_close(merged(name, given_), merged(name, other), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_same_seed_gives_the_same_bytes_and_the_shards_keep_theirs(name: str) -> None:
    given_ = merge_input(2, density=0.5)
    before = given_.deltas_KDF.clone()
    once = merged(name, given_)
    assert torch.equal(once, merged(name, given_))
    assert torch.equal(given_.deltas_KDF, before)
    assert once.dtype == torch.float32


@pytest.mark.parametrize("name", sorted(METHODS))
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), density=DENSITIES, block_rows=st.integers(1, D + 1), threads=st.integers(1, 3))
def test_neither_row_blocks_nor_threads_change_the_merge(
    name: str, seed: int, density: float, block_rows: int, threads: int
) -> None:
    """Where no sum runs over rows the bits are the same: draws belong to the entry, thresholds to the shard."""
    whole = merge_input(seed, density=density, block_rows=D)
    other = merged(name, dataclasses.replace(whole, block_rows=block_rows, threads=threads))
    if name in ("slerp", "keyed"):
        torch.testing.assert_close(other, merged(name, whole), atol=1e-6, rtol=1e-6)
    else:
        assert torch.equal(other, merged(name, whole))


@pytest.mark.parametrize("name", BY_ENTRY)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_one_shard_at_density_one_is_the_identity(name: str, seed: int) -> None:
    given_ = merge_input(seed, shards=1)
    torch.testing.assert_close(merged(name, given_), given_.deltas_KDF[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", BY_ENTRY)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), density=DENSITIES)
def test_what_no_shard_could_move_stays_zero(name: str, seed: int, density: float) -> None:
    given_ = merge_input(seed, density=density)
    assert not merged(name, given_)[~given_.trained_KDF.any(dim=0)].any()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_disjoint_shards_are_simply_added_or_shrunk_evenly(seed: int) -> None:
    given_ = merge_input(seed, disjoint=True)
    added = given_.deltas_KDF.sum(dim=0)
    for name in ("sum", "sign", "ties", "dare_ties", "della", "breadcrumbs", "ram"):
        torch.testing.assert_close(merged(name, given_), added, atol=1e-6, rtol=1e-6)
    for name in ("linear", "dare_linear"):
        torch.testing.assert_close(merged(name, given_), added / K, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(merged("slerp", given_), added / math.sqrt(K), atol=1e-5, rtol=1e-5)


def test_disjoint_mean_keeps_the_bits_of_disjoint_shards() -> None:
    deltas = merge_input(4, disjoint=True).deltas_KDF
    assert torch.equal(disjoint_mean(deltas, elect_signs(deltas)), deltas.sum(dim=0))


@settings(deadline=None)
@given(angle=st.floats(0, math.pi - 0.01), first=st.floats(0.1, 9), second=st.floats(0.1, 9))
def test_slerp_of_two_is_half_way_on_the_sphere(angle: float, first: float, second: float) -> None:
    """Shoemake's formula at t = 1/2 in plain trigonometry."""
    v0, v1 = (first, 0.0), (second * math.cos(angle), second * math.sin(angle))
    weight = math.sin(angle / 2) / math.sin(angle) if angle > 1e-6 else 0.5
    deltas = torch.tensor([[v0], [v1]])
    given_ = MergeInput(deltas, deltas == deltas, [], indices_K=[0, 1], seed=0, density=1.0, keyed_ridge=1.0)
    wanted = [[weight * (a + b) for a, b in zip(v0, v1, strict=True)]]
    np.testing.assert_allclose(merged("slerp", given_).numpy(), wanted, rtol=1e-3, atol=1e-3)


def test_slerp_of_opposite_shards_is_their_mean() -> None:
    deltas = torch.tensor([[[2.0, 4.0]], [[-1.0, -2.0]]])
    given_ = MergeInput(deltas, deltas != 0, [], indices_K=[0, 1], seed=0, density=1.0, keyed_ridge=1.0)
    assert merged("slerp", given_).tolist() == [[0.5, 1.0]]


@pytest.mark.parametrize("name", BY_ENTRY)
def test_shards_that_learned_nothing_merge_to_nothing(name: str) -> None:
    nothing = torch.zeros(2, D, F)
    given_ = MergeInput(nothing, nothing != 0, [], indices_K=[0, 1], seed=0, density=0.5, keyed_ridge=1.0)
    assert torch.equal(merged(name, given_), nothing[0])


def test_exact_cancellation_elects_nothing() -> None:
    deltas = torch.tensor([[[2.0]], [[-2.0]]])
    assert elect_signs(deltas).item() == 0
    assert disjoint_mean(deltas, elect_signs(deltas)).item() == 0
