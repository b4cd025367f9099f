"""Whitened coordinates against a dense oracle, and what they promise of the keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.wise.whitening import key_whitening

F = 12


def dense(keys_NF: Tensor, *, ridge: float) -> Tensor:
    """Oracle: P as its formula, by the eigenvectors of the F × F matrix."""
    keys_NF = torch.unique(keys_NF.double(), dim=0)
    second_FF = keys_NF.T @ keys_NF / len(keys_NF)
    values_F, basis_FF = torch.linalg.eigh(second_FF + ridge * second_FF.trace() / F * torch.eye(F))
    inverse_FF = (basis_FF * values_F.rsqrt()) @ basis_FF.T
    scaled: Tensor = inverse_FF * keys_NF.norm(dim=1).mean() / (keys_NF @ inverse_FF).norm(dim=1).mean()
    return scaled.float()


def alike(count: int, *, seed: int) -> Tensor:
    """Keys that share most of their length, as those of short questions do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, F, generator=generator) + 20 * torch.ones(F)


def cosines(rows_NF: Tensor) -> Tensor:
    unit_NF = torch.nn.functional.normalize(rows_NF, dim=1)
    return unit_NF @ unit_NF.T


@settings(deadline=None)
@given(count=st.integers(1, 30), ridge=st.sampled_from([0.01, 0.1, 1.0, 100.0]), seed=st.integers(0, 100))
def test_it_is_its_formula(count: int, ridge: float, seed: int) -> None:
    keys_NF = alike(count, seed=seed)
    matrix_DF = torch.randn(5, F, generator=torch.Generator().manual_seed(seed))
    expected = matrix_DF @ dense(keys_NF, ridge=ridge)
    torch.testing.assert_close(key_whitening(keys_NF, ridge=ridge)(matrix_DF), expected, atol=2e-3, rtol=1e-3)


def test_keys_that_look_alike_come_apart() -> None:
    keys_NF = alike(F, seed=0)
    apart_NF = key_whitening(keys_NF, ridge=1e-7)(keys_NF)  # P is symmetric
    assert float(cosines(keys_NF).min()) > 0.95
    assert float(cosines(apart_NF).fill_diagonal_(0).abs().max()) < 0.2


@settings(deadline=None)
@given(count=st.integers(1, 30), seed=st.integers(0, 100))
def test_the_mean_length_of_keys_stays(count: int, seed: int) -> None:
    keys_NF = alike(count, seed=seed)
    whitened_NF = key_whitening(keys_NF, ridge=0.1)(keys_NF)
    assert float(whitened_NF.norm(dim=1).mean()) == pytest.approx(float(keys_NF.norm(dim=1).mean()), rel=1e-3)


def test_a_large_ridge_leaves_plain_coordinates() -> None:
    matrix_DF = torch.randn(3, F, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(key_whitening(alike(6, seed=1), ridge=1e8)(matrix_DF), matrix_DF, atol=1e-4, rtol=1e-4)


def test_equal_keys_count_once() -> None:
    keys_NF, matrix_DF = alike(6, seed=2), torch.eye(F)
    often = torch.cat([keys_NF, keys_NF[:2], keys_NF[:2]])
    torch.testing.assert_close(key_whitening(often, ridge=0.1)(matrix_DF), key_whitening(keys_NF, ridge=0.1)(matrix_DF))


@pytest.mark.parametrize("keys_NF", [torch.zeros(0, F), torch.zeros(4, F)])
def test_without_keys_nothing_changes(keys_NF: Tensor) -> None:
    matrix_DF = torch.randn(3, F, generator=torch.Generator().manual_seed(3))
    assert torch.equal(key_whitening(keys_NF, ridge=0.1)(matrix_DF), matrix_DF)
