"""Δ_act, the paper's routing activation, and the choice of a memory by it.

    Δ_act(x) = ‖A(x)(W_v' − W_v)ᵀ‖₂          side memory iff Δ_act(x) > ε          (WISE, §2.3.1)

Where one prompt has several tokens the paper leaves open how their norms become one number. Here, as in the authors'
code (EasyEdit), it is the mean over tokens; the last token alone was tried (docs/experiments.md). We differ from
that code in what goes into the mean:

    theirs                                          here
    act(W_v' a) − act(W_v a), act the FFN's own     (W_v' − W_v) a, as the paper writes it
    every token of the batch, padding included      the prompt's own tokens
    targets too while training, not when asked      never targets, so training and routing measure the same
    once per forward: each new token decides anew   once per sequence, at prefill

A(x) lies before W_v, so nothing a memory does changes it: the decision can be taken inside the forward it steers.
Shape letters: B prompts, T tokens, M memories, D d_model, F d_ff.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def routing_activation(keys_BTF: Tensor, delta_DF: Tensor, prompt_BT: Tensor) -> Tensor:
    """Δ_act of each prompt, float32. `prompt_BT` is true at the prompt's tokens; every row has one at least."""
    norms_BT = torch.linalg.vector_norm((keys_BTF @ delta_DF.T).float(), dim=2)
    mean_B: Tensor = (norms_BT * prompt_BT).sum(dim=1) / prompt_BT.sum(dim=1)
    return mean_B


def activations_of_memories(keys_BTF: Tensor, deltas_DF: Sequence[Tensor], prompt_BT: Tensor) -> Tensor:
    """B × M: Δ_act of each prompt in each memory."""
    return torch.stack([routing_activation(keys_BTF, delta_DF, prompt_BT) for delta_DF in deltas_DF], dim=1)


def choose_memory(strengths_BM: Tensor, thresholds_M: Tensor) -> tuple[Tensor, Tensor]:
    """The memory with the largest Δ_act among those above their own ε (WISE-Retrieve's top-1), and whether there is
    one; where there is none, the largest of all. With one ε for all memories this is the paper's rule."""
    above_BM = strengths_BM > thresholds_M
    passes_B = above_BM.any(dim=1)
    ranked_BM = torch.where(above_BM | ~passes_B[:, None], strengths_BM, -torch.inf)
    return ranked_BM.argmax(dim=1), passes_B
