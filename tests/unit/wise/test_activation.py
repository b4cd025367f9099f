"""Δ_act and the choice of a memory by it."""

import math

import pytest
import torch

from pipeline.wise.activation import activations_of_memories, choose_memory, routing_activation


def test_the_activation_is_the_norm_of_what_the_delta_adds() -> None:
    """Oracle: every product and root written out."""
    delta_DF = torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, 0.0]])
    keys_BF = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    wanted = [math.hypot(1 * 1 + 2 * 0, -1 * 2), math.hypot(2 * 1, 0)]
    assert routing_activation(keys_BF, delta_DF).tolist() == pytest.approx(wanted)


def test_a_zero_delta_activates_nothing_and_can_be_trained() -> None:
    delta_DF = torch.zeros(3, 6, requires_grad=True)
    strength = routing_activation(torch.ones(1, 6), delta_DF)
    strength.sum().backward()
    assert float(strength.detach()) == 0 and bool(delta_DF.grad.isfinite().all())  # type: ignore[union-attr]


def test_the_strongest_memory_above_its_own_threshold_answers() -> None:
    strengths_BM = torch.tensor([[5.0, 9.0], [5.0, 7.0], [1.0, 7.0], [3.0, 8.0]])
    chosen, passes = choose_memory(strengths_BM, torch.tensor([3.0, 8.0]))
    assert passes.tolist() == [True, True, False, False]  # ε itself is not above ε
    assert chosen.tolist() == [1, 0, 1, 1]  # the second row's largest is below its ε, so the other one answers


def test_every_memory_is_asked_on_its_own() -> None:
    generator = torch.Generator().manual_seed(1)
    keys_BF = torch.randn(2, 6, generator=generator)
    deltas = [torch.randn(4, 6, generator=generator) for _ in range(3)]
    together = activations_of_memories(keys_BF, deltas)
    assert together.shape == (2, 3)
    for index, delta_DF in enumerate(deltas):
        assert torch.equal(together[:, index], routing_activation(keys_BF, delta_DF))
