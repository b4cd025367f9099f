"""The routed layer: one batch's decisions, and W_v' = W_v + ΔW where they say so.

The decision is made once per sequence, at prefill, from the base model's state at the last prompt token, and is held
until the sequence ends. The side memory speaks from the last prompt token on: in every forward it acts on the last
column alone, which at prefill is the last prompt token (rows are padded on the left) and afterwards the newest token.
Rows that stay with the main memory are not touched, so their output is the base model's to the bit.

Two ways of addressing a memory. `own`, the paper's, reads it at the prompt's own activation: W a + ΔW a. `matched`
reads it where the matched edit was written: W a + ΔW a_edit,t at the t-th answer position, so the edit's effect does
not depend on how differently it is asked. It holds as long as the answer follows the edit's target; a sequence that
leaves it goes on with `own`.

Releases made by the paper's procedure differ twice: Δ_act decides (`wise/activation.py`), inside the same forward,
since A(x) lies before W_v; and the side memory speaks on the whole routed prompt.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.models.base_model import BaseModel
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.value_matrix import block, value_module
from pipeline.wise.activation import activations_of_memories, choose_memory


@dataclass(frozen=True)
class Decision:
    """Which memory answers and why. Without a release, or with routing off, there is nothing nearest."""

    memory: int | None = None  # index of the side memory; None is the main memory
    edit_id: str | None = None  # nearest edit, also when the main memory answers
    similarity: float = 0.0  # cosine of whitened states, -1 to 1
    score: float = 0.0  # logit of the scope scorer, or Δ_act
    threshold: float = 0.0  # the score must exceed it
    runners_up: tuple[tuple[str, float, float], ...] = ()  # the edits after the nearest: id, score, similarity


@dataclass
class _Row:
    """A running sequence that a side memory answers. `readout_TD` is what its edit's memory says, on the layer's
    device, and `step` counts the target tokens said so far; None: own."""

    memory: int
    entry: int
    step: int | None = None
    readout_TD: Tensor | None = None


class RoutedBatch:
    """Routing state of one batch; `decisions` is filled by its first forward.

    `given`, T tokens for every row, is what the first and only forward reads behind the prompts. `prompt_tokens` are
    the lengths of the prompts, which are padded on the left; None: no row is padded.
    """

    def __init__(
        self,
        base: BaseModel,
        release: LoadedRelease | None,
        *,
        texts: Sequence[str],
        routed: Sequence[bool],
        given: Sequence[Sequence[int]] | None = None,
        prompt_tokens: Sequence[int] | None = None,
    ) -> None:
        self._base, self._release = base, release
        self._texts, self._routed, self._prompt_tokens = texts, routed, prompt_tokens
        self._given = given if given is not None else [()] * len(texts)
        self.decisions: list[Decision] = []
        self._rows: list[_Row | None] = []  # of the batch as it is now; None: main memory

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Forwards of the base model inside this block are routed; outside nothing is left behind."""
        if self._release is None or not self._release.entries:
            self.decisions = self.decisions or [Decision() for _ in self._texts]
            self._rows = self._rows or [None for _ in self._texts]
            yield
            return
        handles = [
            block(self._base.model, self._base.layer).register_forward_pre_hook(self._decide),
            value_module(self._base.model, self._base.layer).register_forward_hook(self._add_side_memory),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def go_on(self, kept: Sequence[int], tokens: Sequence[int]) -> None:
        """Only these positions of the batch go on, and these are the tokens they read next."""
        self._rows = [self._rows[position] for position in kept]
        for row, token in zip(self._rows, tokens, strict=True):
            if row is not None and row.step is not None:
                assert self._release is not None
                target_ids = self._release.entries[row.entry].target_ids
                follows = row.step + 1 < len(target_ids) and target_ids[row.step] == token
                row.step = row.step + 1 if follows else None

    def _decide(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert self._release is not None
        if self.decisions or self._release.thresholds is not None:
            return
        last_of_prompt = -1 - len(self._given[0])
        nearest = decide(self._release, inputs[0][:, last_of_prompt], texts=self._texts, routed=self._routed)
        self.decisions = [decision for decision, _ in nearest]
        self._rows = [
            None if decision.memory is None else self._row(decision.memory, entry) for decision, entry in nearest
        ]

    def _row(self, memory: int, entry: int) -> _Row:
        """An answer that follows its target reads a few numbers of its memory; they go to the device with it."""
        assert self._release is not None
        if self._release.readouts is None:
            return _Row(memory=memory, entry=entry)
        readout_TD = self._release.readouts[entry].to(self._base.layer_device)
        return _Row(memory=memory, entry=entry, step=0, readout_TD=readout_TD)

    def _add_side_memory(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert self._release is not None
        # OPT hands its FFN one long row of tokens, (B·T) × F.
        rows = len(self._rows) or len(self._texts)
        keys_BTF, said_BTD = inputs[0].view(rows, -1, inputs[0].shape[-1]), output.view(rows, -1, output.shape[-1])
        given = len(self._given[0])
        prompt = keys_BTF.shape[1] - given
        if not self.decisions:
            self._decide_by_activation(keys_BTF[:, :prompt])
        spoken = slice(0 if self._release.whole_prompt else prompt - 1, prompt)
        self._speak(keys_BTF[:, spoken], said_BTD[:, spoken])
        for step in range(given):
            self.go_on(range(rows), [tokens[step] for tokens in self._given])
            column = slice(prompt + step, prompt + step + 1)
            self._speak(keys_BTF[:, column], said_BTD[:, column])
        return output

    def _speak(self, keys_BSF: Tensor, said_BSD: Tensor) -> None:
        """Add what the memories say to these columns of W_v's output, in place; what is matched is read at the last."""
        assert self._release is not None
        own: dict[int, list[int]] = {}
        for position, row in enumerate(self._rows):
            if row is None:
                continue
            if row.step is None:
                own.setdefault(row.memory, []).append(position)
            else:
                assert row.readout_TD is not None
                said_BSD[position, -1] += row.readout_TD[row.step]
        for memory, positions in own.items():
            said_BSD[positions] += keys_BSF[positions] @ self._release.memories[memory].T

    def _decide_by_activation(self, keys_BTF: Tensor) -> None:
        """The paper's routing. No edit is matched, so there is none to name."""
        release = self._release
        assert release is not None and release.thresholds is not None
        columns_T = torch.arange(keys_BTF.shape[1], device=keys_BTF.device)
        lengths = self._prompt_tokens or [keys_BTF.shape[1]] * len(keys_BTF)
        prompt_BT = columns_T >= keys_BTF.shape[1] - torch.tensor(lengths, device=keys_BTF.device)[:, None]
        strengths_BM = activations_of_memories(keys_BTF, release.memories, prompt_BT)
        thresholds_M = torch.tensor(release.thresholds, device=keys_BTF.device)
        chosen_B, passes_B = choose_memory(strengths_BM, thresholds_M)
        for strengths_M, allowed, memory, passes in zip(
            strengths_BM.tolist(), self._routed, chosen_B.tolist(), passes_B.tolist(), strict=True
        ):
            decision = Decision(
                memory=memory if passes else None, score=strengths_M[memory], threshold=release.thresholds[memory]
            )
            self.decisions.append(decision if allowed else Decision())
            self._rows.append(_Row(memory=memory, entry=-1) if passes and allowed else None)


def decide(
    release: LoadedRelease, states_BD: Tensor, *, texts: Sequence[str], routed: Sequence[bool]
) -> list[tuple[Decision, int]]:
    """Per row the decision, with the index of the nearest entry: its memory answers when the score passes."""
    router = release.router
    states_BD = states_BD.to(router.mean_D.device)  # where layers lie on several GPUs, that of the layer before
    decisions = []
    for match, allowed in zip(router.match(states_BD, release.reader.read(texts)), routed, strict=True):
        decision = Decision(
            memory=int(router.memory_E[match.entry]) if match.score > router.threshold else None,
            edit_id=release.entries[match.entry].edit_id,
            similarity=match.cosine,
            score=match.score,
            threshold=router.threshold,
            runners_up=tuple(
                (release.entries[entry].edit_id, score, cosine) for entry, score, cosine in match.runners_up
            ),
        )
        decisions.append((decision if allowed else Decision(), match.entry))
    return decisions
