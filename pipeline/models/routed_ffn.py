"""The routed layer: one batch's decisions, and W_v' = W_v + ΔW where they say so.

The decision is made once per sequence, at prefill, from the base model's state at the last prompt token, and is held
until the sequence ends. The side memory speaks from the last prompt token on: in every forward it acts on the last
column alone, which at prefill is the last prompt token (rows are padded on the left) and afterwards the newest token.
Rows that stay with the main memory are not touched, so their output is the base model's to the bit.
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


class RoutedBatch:
    """Routing state of one batch; `decisions` is filled by its first forward."""

    def __init__(
        self, base: BaseModel, release: LoadedRelease | None, *, texts: Sequence[str], routed: Sequence[bool]
    ) -> None:
        self._base, self._release = base, release
        self._texts, self._routed = texts, routed
        self.decisions: list[Decision] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Forwards of the base model inside this block are routed; outside nothing is left behind."""
        if self._release is None or not self._release.entries:
            self.decisions = self.decisions or [Decision() for _ in self._texts]
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

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows of the batch go on."""
        self._row_count = len(rows)
        self._rows_of_memory = _group(self.decisions, rows) if self.decisions else {}

    def _decide(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not self.decisions:
            assert self._release is not None
            self.decisions = decide(self._release, inputs[0][:, -1], texts=self._texts, routed=self._routed)
            self.keep(range(len(self.decisions)))

    def _add_side_memory(self, module: nn.Module, inputs: tuple[Tensor, ...], output_BTD: Tensor) -> Tensor:
        assert self._release is not None
        # OPT hands its FFN one long row of tokens, (B·T) × F.
        keys_BTF = inputs[0].view(self._row_count, -1, inputs[0].shape[-1])
        rows_BTD = output_BTD.view(self._row_count, -1, output_BTD.shape[-1])
        for memory, rows in self._rows_of_memory.items():
            rows_BTD[rows, -1] += keys_BTF[rows, -1] @ self._release.memories[memory].T
        return output_BTD


def decide(
    release: LoadedRelease, states_BD: Tensor, *, texts: Sequence[str], routed: Sequence[bool]
) -> list[Decision]:
    """The nearest edit of each row, and its memory when the score passes the threshold."""
    router = release.router
    signals_BES = router.signals(states_BD, release.subjects.mentions(texts).to(states_BD.device))
    scores_B, entries_B = router.scores(signals_BES).max(dim=1)
    decisions = []
    for row, (score, entry, allowed) in enumerate(zip(scores_B.tolist(), entries_B.tolist(), routed, strict=True)):
        if not allowed:
            decisions.append(Decision())
            continue
        decisions.append(
            Decision(
                memory=int(router.memory_E[entry]) if score > router.threshold else None,
                edit_id=release.entries[entry].edit_id,
                similarity=float(signals_BES[row, entry, 0]),
                score=score,
                threshold=router.threshold,
            )
        )
    return decisions


def _group(decisions: Sequence[Decision], rows: Sequence[int]) -> dict[int, list[int]]:
    """Rows of the shrunken batch, by the side memory they read."""
    groups: dict[int, list[int]] = {}
    for position, row in enumerate(rows):
        memory = decisions[row].memory
        if memory is not None:
            groups.setdefault(memory, []).append(position)
    return groups
