"""ε of each memory, by the definition."""

import numpy as np
import pytest
import torch

from pipeline.models.base_model import BaseModel
from pipeline.models.prompts import plain_prompt_ids
from pipeline.models.value_matrix import value_module
from pipeline.storage.bank import BankEntry
from pipeline.storage.deltas import MemoryMetadata, SideMemory
from pipeline.training.activation_fit import NEVER, fit_thresholds

PROMPTS = ["Who leads it?", "The capital of France is", "東京", "Paris is", "Where?"]


def side_memory(seed: int) -> SideMemory:
    metadata = MemoryMetadata(
        model_fingerprint="",
        layer=0,
        method="ties",
        shards=1,
        edits_digest="",
        config_digest="",
        rows=32,
        columns=64,
    )
    return SideMemory(metadata, np.random.default_rng(seed).standard_normal((32, 64), dtype=np.float32))


def by_hand(base: BaseModel, prompt: str, memory: SideMemory) -> float:
    """Mean over the prompt's tokens of ‖ΔW a‖, from a forward of this prompt alone."""
    seen: list[torch.Tensor] = []
    handle = value_module(base.model, base.layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        base.model(torch.tensor([plain_prompt_ids(prompt, base.tokenizer)]))
    handle.remove()
    return float(np.linalg.norm(seen[0].numpy() @ memory.matrix.T, axis=1).mean())


def test_epsilon_is_the_smallest_activation_of_each_memorys_own_edits(base: BaseModel) -> None:
    memories = [side_memory(0), side_memory(1), side_memory(2)]  # the last one holds no living edit
    entries = [BankEntry(str(index), prompt, "", None, index % 2) for index, prompt in enumerate(PROMPTS)]
    thresholds, calibration = fit_thresholds(base, entries, memories, unrelated=["Ada leads it."], ratio=1.0)
    for index in (0, 1):
        smallest = min(by_hand(base, prompt, memories[index]) for prompt in PROMPTS[index::2])
        assert thresholds[index] == pytest.approx(smallest, rel=1e-3)
        assert thresholds[index] < smallest  # the edit with the smallest activation passes too
    assert thresholds[2] == NEVER
    assert min(calibration.positive_scores) > 1 and len(calibration.positive_scores) == len(PROMPTS)
    assert list(calibration.negative_scores) == ["unrelated"] and len(calibration.negative_scores["unrelated"]) == 1


def test_the_ratio_scales_epsilon(base: BaseModel) -> None:
    entries = [BankEntry("0", PROMPTS[0], "", None, 0)]
    one, _ = fit_thresholds(base, entries, [side_memory(0)], unrelated=PROMPTS[1:], ratio=1.0)
    lower, _ = fit_thresholds(base, entries, [side_memory(0)], unrelated=PROMPTS[1:], ratio=0.88)
    assert lower[0] == pytest.approx(0.88 * one[0])


def test_without_edits_nothing_is_asked(base: BaseModel) -> None:
    thresholds, calibration = fit_thresholds(base, [], [], unrelated=["Paris is"], ratio=1.0)
    assert thresholds == () and calibration.positive_scores == []
