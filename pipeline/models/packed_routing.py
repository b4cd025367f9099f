"""The routed layer for packed tokens: each forward reads pieces of many sequences, each with a release of its own.

The rules are those of `routed_ffn.py`. What differs is that a sequence may be read in pieces, and again from its start
when it lost its place in the cache. So what a memory says is a function of the position in the sequence alone: before
the last prompt token nothing, from there on the t-th readout while the answer followed its target that far, else ΔW
times the token's own key.

A release whose memories act on the whole prompt (the paper's procedure) must know its decision before the first piece:
such a prompt is read twice, the first time for the decision.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.models.base_model import BaseModel
from pipeline.models.generate import GenerationRequest
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.routed_ffn import Decision, RoutedBatch, decide
from pipeline.models.value_matrix import block, value_module


class RoutedSequence:
    """Routing of one request, from its first token to its last; it keeps the release it began with."""

    def __init__(self, base: BaseModel, release: LoadedRelease | None, request: GenerationRequest) -> None:
        self.decision: Decision | None = None  # None: its last prompt token has not been read yet
        self._base, self.text, self._routed = base, request.text, request.routed
        self.last_prompt = len(request.prompt_ids) - 1
        self._target: tuple[int, ...] = ()
        self._readout_TD: Tensor | None = None  # what its edit's memory says, on the layer's device; None: own
        self._followed, self._follows = 0, True  # target tokens said so far; whether the next one may still agree
        self.release = release if release is not None and release.entries and request.routed else None
        if self.release is None:
            self.decision = Decision()
        elif self.release.whole_prompt or self.release.thresholds is not None:
            self.decision = _read_once(base, self.release, request)

    def decided(self, decision: Decision, entry: int) -> None:
        """The router's word on the state at the last prompt token."""
        assert self.release is not None
        self.decision = decision
        if decision.memory is not None and self.release.readouts is not None:
            self._target = self.release.entries[entry].target_ids
            self._readout_TD = self.release.readouts[entry].to(self._base.layer_device)

    def say(self, token: int) -> None:
        """`token` is the next one of the answer."""
        if self._follows:
            self._follows = self._followed < len(self._target) and self._target[self._followed] == token
            self._followed += self._follows

    def awaits_decision(self, first: int, count: int) -> bool:
        """Whether these positions hold the last prompt token of a sequence that is not decided."""
        return self.decision is None and first <= self.last_prompt < first + count

    def spoken(self, first: int, count: int) -> range:
        """Positions among these where a memory speaks."""
        if self.decision is None or self.decision.memory is None:
            return range(0)
        assert self.release is not None
        start = 0 if self.release.whole_prompt else self.last_prompt
        return range(max(first, start), first + count)

    def readout(self, position: int) -> Tensor | None:
        """What is matched there, D; None: the memory is read at the token's own key."""
        step = position - self.last_prompt
        if self._readout_TD is None or not 0 <= step < len(self._target) or step > self._followed:
            return None
        return self._readout_TD[step]


@dataclass(frozen=True)
class Piece:
    """Packed tokens `start` to `start + count` are the positions from `first` on of one sequence."""

    sequence: RoutedSequence
    start: int
    first: int
    count: int


@contextmanager
def routed(base: BaseModel, pieces: Sequence[Piece]) -> Iterator[None]:
    """Forwards of the base model inside this block read these pieces and are routed; nothing is left behind.

    Pieces that stay with the main memory are not touched."""
    if all(piece.sequence.release is None for piece in pieces):
        yield
        return

    def before_layer(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _decide(inputs[0][0], [piece for piece in pieces if piece.sequence.awaits_decision(piece.first, piece.count)])

    def after_value(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # OPT hands its FFN a T × F matrix, others 1 × T × F.
        _speak(inputs[0].view(-1, inputs[0].shape[-1]), output.view(-1, output.shape[-1]), pieces)
        return output

    handles = [
        block(base.model, base.layer).register_forward_pre_hook(before_layer),
        value_module(base.model, base.layer).register_forward_hook(after_value),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _decide(states_TD: Tensor, pieces: Sequence[Piece]) -> None:
    """One call of the router for all pieces of a release; each is scored alone."""
    by_release: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_release.setdefault(id(piece.sequence.release), []).append(piece)
    for group in by_release.values():
        release = group[0].sequence.release
        assert release is not None
        last_of_prompts = [piece.start + piece.sequence.last_prompt - piece.first for piece in group]
        texts = [piece.sequence.text for piece in group]
        decisions = decide(release, states_TD[last_of_prompts], texts=texts, routed=[True] * len(group))
        for piece, (decision, entry) in zip(group, decisions, strict=True):
            piece.sequence.decided(decision, entry)


def _speak(keys_TF: Tensor, said_TD: Tensor, pieces: Sequence[Piece]) -> None:
    """Add to W_v's output what memories say, in place: the readouts in one call, each memory's own in one."""
    matched: dict[int, Tensor] = {}
    own: dict[tuple[int, int], tuple[LoadedRelease, list[int]]] = {}
    for piece in pieces:
        sequence = piece.sequence
        for position in sequence.spoken(piece.first, piece.count):
            token = piece.start + position - piece.first
            readout_D = sequence.readout(position)
            if readout_D is not None:
                matched[token] = readout_D
                continue
            assert sequence.release is not None and sequence.decision is not None
            assert sequence.decision.memory is not None
            memory = (id(sequence.release), sequence.decision.memory)
            own.setdefault(memory, (sequence.release, []))[1].append(token)
    if matched:
        said_TD[list(matched)] += torch.stack(list(matched.values()))
    for (_, memory_index), (release, tokens) in own.items():
        said_TD[tokens] += keys_TF[tokens] @ release.memories[memory_index].T


def _read_once(base: BaseModel, release: LoadedRelease, request: GenerationRequest) -> Decision:
    """The decision of one prompt, from a forward of its own."""
    batch = RoutedBatch(base, release, texts=[request.text], routed=[True])
    with torch.no_grad(), batch.installed():
        base.model(input_ids=torch.tensor([request.prompt_ids], device=base.device), use_cache=False, logits_to_keep=1)
    return batch.decisions[0]
