"""Δ_act and the choice of a memory by it."""

import math

import pytest
import torch

from pipeline.wise.activation import activations_of_memories, choose_memory, routing_activation


def test_the_activation_is_the_mean_norm_over_the_prompts_tokens() -> None:
    """Oracle: every product and root written out."""
    delta_DF = torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, 0.0]])
    keys_BTF = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 0.0, 1.0], [9.0, 9.0, 9.0]]])
    prompt_BT = torch.tensor([[True, True, False]])
    norms = [math.hypot(1 * 1 + 2 * 0, -1 * 2), math.hypot(2 * 1, 0)]
    assert float(routing_activation(keys_BTF, delta_DF, prompt_BT)) == pytest.approx(sum(norms) / 2)


def test_padding_on_either_side_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    keys_TF, delta_DF = torch.randn(4, 6, generator=generator), torch.randn(3, 6, generator=generator)
    alone = routing_activation(keys_TF[None], delta_DF, torch.ones(1, 4, dtype=torch.bool))
    for left, right in ((3, 0), (0, 3), (2, 5)):
        padded = torch.randn(1, left + 4 + right, 6, generator=generator)
        padded[0, left : left + 4] = keys_TF
        prompt = torch.zeros(1, left + 4 + right, dtype=torch.bool)
        prompt[0, left : left + 4] = True
        assert torch.allclose(routing_activation(padded, delta_DF, prompt), alone)


def test_a_zero_delta_activates_nothing_and_can_be_trained() -> None:
    delta_DF = torch.zeros(3, 6, requires_grad=True)
    strength = routing_activation(torch.ones(1, 2, 6), delta_DF, torch.ones(1, 2, dtype=torch.bool))
    strength.sum().backward()
    assert float(strength.detach()) == 0 and bool(delta_DF.grad.isfinite().all())  # type: ignore[union-attr]


def test_the_strongest_memory_above_its_own_threshold_answers() -> None:
    strengths_BM = torch.tensor([[5.0, 9.0], [5.0, 7.0], [1.0, 7.0], [3.0, 8.0]])
    chosen, passes = choose_memory(strengths_BM, torch.tensor([3.0, 8.0]))
    assert passes.tolist() == [True, True, False, False]  # ε itself is not above ε
    assert chosen.tolist() == [1, 0, 1, 1]  # the second row's largest is below its ε, so the other one answers


def test_every_memory_is_asked_on_its_own() -> None:
    generator = torch.Generator().manual_seed(1)
    keys, prompt = torch.randn(2, 3, 6, generator=generator), torch.ones(2, 3, dtype=torch.bool)
    deltas = [torch.randn(4, 6, generator=generator) for _ in range(3)]
    together = activations_of_memories(keys, deltas, prompt)
    assert together.shape == (2, 3)
    for index, delta_DF in enumerate(deltas):
        assert torch.equal(together[:, index], routing_activation(keys, delta_DF, prompt))
