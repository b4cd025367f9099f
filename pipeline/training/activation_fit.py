"""The paper's routing threshold ε for each memory of a release, and how prompts in and out of scope lie around it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.models.base_model import BaseModel
from pipeline.storage.bank import BankEntry
from pipeline.storage.deltas import SideMemory
from pipeline.training.edit_stream import choose_unrelated, extract_prompts, prompt_tokens
from pipeline.training.router_fit import Calibration
from pipeline.wise.activation import activations_of_memories

BATCH = 64
BELOW = 1 - 1e-4  # the edit with the smallest Δ_act passes too, however a batch rounds it
NEVER = float(torch.finfo(torch.float32).max)


def fit_thresholds(
    base: BaseModel,
    entries: Sequence[BankEntry],
    memories: Sequence[SideMemory],
    *,
    unrelated: Sequence[str],
    ratio: float,
) -> tuple[tuple[float, ...], Calibration]:
    """ε of each memory, and Δ_act relative to it (the largest over the memories; above 1 a side memory answers).

    ε is the smallest Δ_act among the memory's living edits, asked bare, times `ratio` (the paper: 1). Δ_act is that of
    the finished memory, the W_v' that answers. The authors' code notes each edit's when its own steps end, and takes
    0.88 of the smallest; but merged shards add up, and then everything is above it (docs/experiments.md).
    """
    if not entries:
        return tuple(1.0 for _ in memories), Calibration([], {})
    deltas_DF = [torch.from_numpy(memory.matrix.copy()) for memory in memories]
    edits_EM = _strengths(base, [entry.prompt for entry in entries], deltas_DF)
    foreign = choose_unrelated(unrelated, (), [entry.subject for entry in entries])
    unrelated_UM = _strengths(base, foreign, deltas_DF)
    memory_E = torch.tensor([entry.memory for entry in entries])
    own = [edits_EM[memory_E == index, index] for index in range(len(memories))]
    # A memory without living edits answers nothing.
    thresholds = tuple(BELOW * ratio * float(own_E.min()) if len(own_E) else NEVER for own_E in own)
    thresholds_M = torch.tensor(thresholds)
    return thresholds, Calibration(
        positive_scores=(edits_EM / thresholds_M).amax(dim=1).tolist(),
        negative_scores={"unrelated": (unrelated_UM / thresholds_M).amax(dim=1).tolist()},
    )


@torch.no_grad()
def _strengths(base: BaseModel, prompts: Sequence[str], deltas_DF: Sequence[Tensor]) -> Tensor:
    """N × M, prompts that do not fit the model's context left out."""
    parts = []
    for start in range(0, len(prompts), BATCH):
        read = extract_prompts(base, prompts[start : start + BATCH])
        parts.append(activations_of_memories(read.keys_NTF, deltas_DF, prompt_tokens(read)))
    return torch.cat(parts)
