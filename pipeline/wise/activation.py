"""Δ_act, the paper's routing activation, and the choice of a memory by it.

    Δ_act(x) = ‖A(x)(W_v' − W_v)ᵀ‖₂          side memory iff Δ_act(x) > ε          (WISE, §2.3.1)

A prompt has many tokens, and the paper leaves open at which of them A(x) is read. Here it is the prompt's last token:
where the decision is needed, and where the state has seen the whole question. The authors' code (EasyEdit) differs:

    theirs                                          here
    act(W_v' a) − act(W_v a), act the FFN's own     (W_v' − W_v) a, as the paper writes it
    mean over all tokens, padding and targets too   the last prompt token
    once per forward: each new token decides anew   once per sequence, at prefill

Questions of one kind share most of their tokens, so that a mean over them can hardly be loud for one and quiet for the
other (docs/experiments.md). A(x) lies before W_v, so nothing a memory does changes it: the decision can be taken
inside the forward it steers.

Shape letters: B prompts, M memories, D d_model, F d_ff.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def routing_activation(keys_BF: Tensor, delta_DF: Tensor) -> Tensor:
    """Δ_act for each key, float32."""
    norms_B: Tensor = torch.linalg.vector_norm((keys_BF @ delta_DF.T).float(), dim=1)
    return norms_B


def activations_of_memories(keys_BF: Tensor, deltas_DF: Sequence[Tensor]) -> Tensor:
    """B × M: Δ_act of each prompt in each memory."""
    return torch.stack([routing_activation(keys_BF, delta_DF) for delta_DF in deltas_DF], dim=1)


def choose_memory(strengths_BM: Tensor, thresholds_M: Tensor) -> tuple[Tensor, Tensor]:
    """The memory with the largest Δ_act among those above their own ε (WISE-Retrieve's top-1), and whether there is
    one; where there is none, the largest of all. With one ε for all memories this is the paper's rule."""
    above_BM = strengths_BM > thresholds_M
    passes_B = above_BM.any(dim=1)
    ranked_BM = torch.where(above_BM | ~passes_B[:, None], strengths_BM, -torch.inf)
    return ranked_BM.argmax(dim=1), passes_B
