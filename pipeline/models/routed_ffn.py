"""The routed layer: one batch's decisions, and W_v' = W_v + ΔW where they say so.

The decision is made once per sequence, at prefill, from the base model's state at the last prompt token, and is held
until the sequence ends. The side memory speaks from the last prompt token on: in every forward it acts on the last
column alone, which at prefill is the last prompt token (rows are padded on the left) and afterwards the newest token.
Rows that stay with the main memory are not touched, so their output is the base model's to the bit.

Two ways of addressing a memory. `own`, the paper's, reads it at the prompt's own activation: W a + ΔW a. `matched`
reads it where the matched edit was written: W a + ΔW a_edit,t at the t-th answer position, so the edit's effect does
not depend on how differently it is asked. It holds as long as the answer follows the edit's target; a sequence that
leaves it goes on with `own`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from pipeline.models.base_model import BaseModel
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.value_matrix import block, value_module


@dataclass(frozen=True)
class Decision:
    """Which memory answers and why. Without a release, or with routing off, there is nothing nearest."""

    memory: int | None = None  # index of the side memory; None is the main memory
    edit_id: str | None = None  # nearest edit, also when the main memory answers
    similarity: float = 0.0  # cosine of whitened states, -1 to 1
    score: float = 0.0  # logit of the scope scorer
    threshold: float = 0.0  # the score must exceed it


@dataclass
class _Row:
    """A running sequence that a side memory answers. `step` counts the target tokens said so far; None: own."""

    memory: int
    entry: int
    step: int | None


class RoutedBatch:
    """Routing state of one batch; `decisions` is filled by its first forward."""

    def __init__(
        self, base: BaseModel, release: LoadedRelease | None, *, texts: Sequence[str], routed: Sequence[bool]
    ) -> None:
        self._base, self._release = base, release
        self._texts, self._routed = texts, routed
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
        if self.decisions:
            return
        assert self._release is not None
        nearest = decide(self._release, inputs[0][:, -1], texts=self._texts, routed=self._routed)
        self.decisions = [decision for decision, _ in nearest]
        first_step = None if self._release.readouts is None else 0
        self._rows = [
            None if decision.memory is None else _Row(memory=decision.memory, entry=entry, step=first_step)
            for decision, entry in nearest
        ]

    def _add_side_memory(self, module: nn.Module, inputs: tuple[Tensor, ...], output_BTD: Tensor) -> Tensor:
        assert self._release is not None
        # OPT hands its FFN one long row of tokens, (B·T) × F.
        keys_BF = inputs[0].view(len(self._rows), -1, inputs[0].shape[-1])[:, -1]
        last_BD = output_BTD.view(len(self._rows), -1, output_BTD.shape[-1])[:, -1]
        own: dict[int, list[int]] = {}
        for position, row in enumerate(self._rows):
            if row is None:
                continue
            if row.step is None:
                own.setdefault(row.memory, []).append(position)
            else:
                assert self._release.readouts is not None
                last_BD[position] += self._release.readouts[row.entry][row.step]
        for memory, positions in own.items():
            last_BD[positions] += keys_BF[positions] @ self._release.memories[memory].T
        return output_BTD


def decide(
    release: LoadedRelease, states_BD: Tensor, *, texts: Sequence[str], routed: Sequence[bool]
) -> list[tuple[Decision, int]]:
    """Per row the decision, with the index of the nearest entry: its memory answers when the score passes."""
    router = release.router
    decisions = []
    for match, allowed in zip(router.match(states_BD, release.reader.read(texts)), routed, strict=True):
        decision = Decision(
            memory=int(router.memory_E[match.entry]) if match.score > router.threshold else None,
            edit_id=release.entries[match.entry].edit_id,
            similarity=match.cosine,
            score=match.score,
            threshold=router.threshold,
        )
        decisions.append((decision if allowed else Decision(), match.entry))
    return decisions
