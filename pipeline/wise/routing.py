"""The router: main memory or which side memory, once per sequence.

A bank holds one entry per edit. A prompt is scored against entries by a small logistic model over the signals; the best
entry is routed to when its score passes the threshold. This replaces the paper's Δ_act > ε: it needs no margin loss,
and it names the edit that was matched.

    signal     value per (prompt, entry)                                                        available
    keys       cosine of whitened base-model states at the last prompt token entering layer L,   always
               the best over the entry's wordings
    subject    +1 mentioned, 0 partly or unknown, −1 not (models/mentions.py)                    always
    encoder    cosine of what prompt and edit ask, by a sentence encoder                         with the encoder
    relation   the same with the subject masked in both; 0 where it is not mentioned             with the encoder

In a large bank only candidates are scored: the entries that the prompt mentions, and the nearest by a sketch of `keys`
and `encoder`. Every prompt is scored alone, so no other row of its batch can change a bit of its scores.

Shape letters: B prompts, E entries, N keys (all wordings of all entries), D d_model, M width of the encoder, S signals,
C candidates of one prompt, R masked readings of one prompt, P width of the sketch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

SIGNALS = ("keys", "subject", "encoder", "relation")
WHITENING_RIDGE = 1.0  # of the mean variance; measured against 0.1, see docs/experiments.md
ABSENT = -1.0  # the subject signal of a subject that is known and not mentioned
FULLY_SCORED = 4096  # banks up to this size are scored without a sketch
SKETCH = 64
QUERY_SCALE = 127 / 2**0.5  # a prompt's state and embedding have unit length each
FAR = 2.0**22  # so that sums of whole numbers stay exact in float32
RUNNERS_UP = 4  # entries behind the nearest one, for explanations
CHUNK = 16  # prompts at a time: measured fastest
BLOCK, BLOCKS, NEAREST = 256, 16, 48  # candidates are the best of the best blocks


@dataclass(frozen=True)
class Reading:
    """What the text signals see of one prompt: how much of it each *mentioned* entry explains."""

    known_E: Tensor  # bool, the same for all prompts: is an entry's subject known?
    entries_C: Tensor  # mentioned entries, ascending, each once
    subject_C: Tensor
    masked_C: Tensor  # row of masked_RM that belongs to the entry
    asked_M: Tensor  # embedding of what the prompt asks; empty without encoder
    masked_RM: Tensor  # the same with one subject masked


@dataclass(frozen=True)
class Match:
    """The nearest entry of a prompt. `entry` is −1 in a bank that has no entry to offer."""

    entry: int
    score: float
    cosine: float  # of whitened states
    signals: tuple[float, ...] = ()
    runners_up: tuple[tuple[int, float, float], ...] = ()  # the next entries, their scores and cosines


NO_MATCH = Match(entry=-1, score=float("-inf"), cosine=0.0)


@dataclass(frozen=True)
class Router:
    mean_D: Tensor  # over unrelated text
    whiten_DD: Tensor
    keys_ND: Tensor  # unit length, whitened
    entry_N: Tensor  # which entry a key belongs to; ascending
    memory_E: Tensor  # which side memory holds an entry's edit
    asked_EM: Tensor  # embeddings of the edits' prompts; M is 0 without encoder
    relation_EM: Tensor  # the same with the subject masked
    weights_S: Tensor  # logistic weights, zero for a signal that is switched off
    bias_E: Tensor  # entries whose subject is unknown have another one
    threshold: float
    encoder: str = ""  # fingerprint of the sentence encoder

    def match(
        self, states_BD: Tensor, readings: Sequence[Reading], *, hidden: Sequence[Collection[int]] | None = None
    ) -> list[Match]:
        """The nearest entry of every prompt. `hidden[b]`: entries that prompt b is not compared with."""
        if not len(self.memory_E):
            return [NO_MATCH for _ in readings]
        queries = [whitened(state_D[None], self.mean_D, self.whiten_DD)[0] for state_D in states_BD]
        near = self._nearest(queries, readings)
        return [
            self._best(query_D, reading, near_C, hidden[row] if hidden else ())
            for row, (query_D, reading, near_C) in enumerate(zip(queries, readings, near, strict=True))
        ]

    def signals(self, query_D: Tensor, reading: Reading, entries_C: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """C × S signals of the entries (None: all, in order), and C cosines of states. `query_D` is whitened."""
        cosine_C = self._cosine(query_D, entries_C)
        chosen = slice(None) if entries_C is None else entries_C
        subject_C = torch.where(reading.known_E.to(cosine_C.device)[chosen], ABSENT, 0.0)
        encoder_C = relation_C = torch.zeros_like(cosine_C)
        if len(reading.asked_M):
            encoder_C = self._asked_EM[chosen].float() @ reading.asked_M.to(cosine_C)
        if len(reading.entries_C):
            device = cosine_C.device
            mentioned_M = reading.entries_C.to(device)
            place_M = mentioned_M if entries_C is None else torch.searchsorted(entries_C, mentioned_M)
            subject_C[place_M] = reading.subject_C.to(subject_C)
            if len(reading.masked_RM):
                masked_MM = reading.masked_RM.to(cosine_C)[reading.masked_C.to(device)]
                relation_C = relation_C.clone()
                relation_C[place_M] = (self.relation_EM[mentioned_M].float() * masked_MM).sum(dim=1)
        return torch.stack([cosine_C, subject_C, encoder_C, relation_C], dim=1), cosine_C

    def signals_of(self, state_D: Tensor, reading: Reading, entry: int) -> Tensor:
        """S signals of one entry, whichever is the nearest."""
        query_D = whitened(state_D[None], self.mean_D, self.whiten_DD)[0]
        own_C = reading.entries_C == entry
        only = replace(
            reading,
            entries_C=reading.entries_C[own_C],
            subject_C=reading.subject_C[own_C],
            masked_C=reading.masked_C[own_C],
        )
        signals_1S, _ = self.signals(query_D, only, torch.tensor([entry], device=query_D.device))
        return signals_1S[0]

    def _best(self, query_D: Tensor, reading: Reading, near_C: Tensor | None, hidden: Collection[int]) -> Match:
        entries_C = None
        if near_C is not None:
            entries_C = near_C.new_tensor(sorted({*near_C.tolist(), *reading.entries_C.tolist()}))
        signals_CS, cosine_C = self.signals(query_D, reading, entries_C)
        bias_C = self.bias_E if entries_C is None else self.bias_E[entries_C]
        scores_C = (signals_CS * self.weights_S).sum(dim=1) + bias_C
        if hidden:
            out = torch.tensor(sorted(hidden), device=scores_C.device)
            scores_C[out if entries_C is None else torch.isin(entries_C, out)] = float("-inf")
        place = int(scores_C.argmax())
        best_T = scores_C.topk(min(1 + RUNNERS_UP, len(scores_C))).indices
        following_T = best_T[best_T != place][:RUNNERS_UP]
        entries_T = following_T if entries_C is None else entries_C[following_T]
        following_3T = torch.stack([entries_T.double(), scores_C[following_T], cosine_C[following_T]])
        return Match(
            entry=place if entries_C is None else int(entries_C[place]),
            score=float(scores_C[place]),
            cosine=float(cosine_C[place]),
            signals=tuple(signals_CS[place].tolist()),
            runners_up=tuple(
                (int(entry), score, cosine) for entry, score, cosine in following_3T.T.tolist() if score > float("-inf")
            ),
        )

    def _cosine(self, query_D: Tensor, entries_C: Tensor | None) -> Tensor:
        """C: the best over each entry's wordings."""
        if entries_C is None:
            cosine_N, owner_N, count = self.keys_ND @ query_D, self.entry_N, len(self.memory_E)
        else:
            count_C = self._start_E[entries_C + 1] - self._start_E[entries_C]
            owner_N = torch.repeat_interleave(torch.arange(len(entries_C), device=count_C.device), count_C)
            first_N = (self._start_E[entries_C] - (count_C.cumsum(0) - count_C))[owner_N]
            rows_N = first_N + torch.arange(len(owner_N), device=count_C.device)
            cosine_N, count = self.keys_ND[rows_N] @ query_D, len(entries_C)
        return cosine_N.new_full((count,), -1.0).scatter_reduce_(0, owner_N, cosine_N, reduce="amax")

    @cached_property
    def _asked_EM(self) -> Tensor:
        """A bank that is scored whole is not converted for every prompt."""
        return self.asked_EM.float() if len(self.asked_EM) <= FULLY_SCORED else self.asked_EM

    @cached_property
    def _start_E(self) -> Tensor:
        """E + 1: where each entry's keys begin."""
        ends = torch.bincount(self.entry_N, minlength=len(self.memory_E)).cumsum(0)
        return torch.cat([ends.new_zeros(1), ends])

    def _nearest(self, queries: Sequence[Tensor], readings: Sequence[Reading]) -> list[Tensor] | list[None]:
        """Per prompt the entries whose sketch is nearest; None in a small bank."""
        if len(self.memory_E) <= FULLY_SCORED:
            return [None for _ in queries]
        sketch_EP, basis_WP, scale = self._sketch
        # In the sketch's units what an entry's score is without a mention, beside `keys` and `encoder`.
        unmentioned_E = torch.where(readings[0].known_E.to(self.bias_E.device), ABSENT, 0.0)
        apart_E = ((self.bias_E + self.weights_S[1] * unmentioned_E) * scale).round().clamp(-FAR, FAR)
        apart_E = torch.nn.functional.pad(apart_E, (0, len(sketch_EP) - len(apart_E)), value=-FAR)
        rows = [
            (torch.cat([query_D, reading.asked_M.to(query_D)]) @ basis_WP * QUERY_SCALE).round()
            for query_D, reading in zip(queries, readings, strict=True)
        ]
        near: list[Tensor] = []
        for start in range(0, len(rows), CHUNK):
            near_BE = torch.addmm(apart_E, torch.stack(rows[start : start + CHUNK]), sketch_EP.T)
            block_BK = near_BE.view(len(near_BE), -1, BLOCK).amax(dim=2).topk(BLOCKS, dim=1).indices
            within_BL = (block_BK[:, :, None] * BLOCK + torch.arange(BLOCK, device=block_BK.device)).flatten(1)
            top_BC = near_BE.gather(1, within_BL).topk(NEAREST, dim=1).indices
            near += [row_C[row_C < len(self.memory_E)] for row_C in within_BL.gather(1, top_BC)]
        return near

    @cached_property
    def _sketch(self) -> tuple[Tensor, Tensor, float]:
        """E' × P, the basis W × P (W = D + M) it was made with, and how many of its units are one unit of score: the
        dot product of two sketches is about what `keys` and `encoder` add to a score.

        The basis spans the bank's principal directions (randomised range finder, Halko et al., 2011, fixed seed).
        Sketches are whole numbers up to 127, so their products are exact in float32, whatever the order of summation:
        the candidates of a prompt are the same in any batch. E' is E rounded up to whole blocks."""
        centre_ED = self.keys_ND.new_zeros(len(self.memory_E), self.keys_ND.shape[1])
        centre_ED.index_add_(0, self.entry_N, self.keys_ND)
        centre_ED /= self._start_E.diff().clamp(min=1)[:, None]
        keys, encoder = float(self.weights_S[0]), float(self.weights_S[2])
        whole_EW = torch.cat([centre_ED * keys, self.asked_EM.float() * encoder], dim=1)
        sample_EW = whole_EW[:: max(1, len(whole_EW) // FULLY_SCORED)]
        generator = torch.Generator().manual_seed(0)
        basis_WP = torch.randn(whole_EW.shape[1], SKETCH, generator=generator).to(whole_EW)
        for _ in range(3):
            basis_WP = torch.linalg.qr(sample_EW.T @ (sample_EW @ basis_WP)).Q
        sketch_EP = whole_EW @ basis_WP
        entry_scale = 127 / max(float(sketch_EP.abs().max()), 1e-6)
        sketch_EP = torch.nn.functional.pad((sketch_EP * entry_scale).round(), (0, 0, 0, -len(sketch_EP) % BLOCK))
        return sketch_EP, basis_WP, entry_scale * QUERY_SCALE


def empty_router(width: int) -> Router:
    """A router without entries: every prompt stays with the main memory. `width`: D."""
    return Router(
        mean_D=torch.zeros(width),
        whiten_DD=torch.eye(width),
        keys_ND=torch.zeros(0, width),
        entry_N=torch.zeros(0, dtype=torch.long),
        memory_E=torch.zeros(0, dtype=torch.long),
        asked_EM=torch.zeros(0, 0),
        relation_EM=torch.zeros(0, 0),
        weights_S=torch.zeros(len(SIGNALS)),
        bias_E=torch.zeros(0),
        threshold=0.0,
    )


def whitening(deviations_MD: Tensor) -> Tensor:
    """(Σ + ridge)^(−1/2) of how states deviate within one edit: what differs between wordings of the same question is
    noise, and is scaled down (within-class covariance normalisation, Hatch et al., Interspeech 2006)."""
    deviations_MD = deviations_MD.double()
    variance_D, basis_DD = torch.linalg.eigh(deviations_MD.T @ deviations_MD / len(deviations_MD))
    variance_D = variance_D.clamp(min=0)
    ridge = WHITENING_RIDGE * float(variance_D.mean()) or 1.0  # without any deviation nothing is scaled
    whiten_DD: Tensor = ((basis_DD * (variance_D + ridge).rsqrt()) @ basis_DD.T).float()
    return whiten_DD


def whitened(states_BD: Tensor, mean_D: Tensor, whiten_DD: Tensor) -> Tensor:
    """Whitened states of unit length."""
    unit_BD: Tensor = torch.nn.functional.normalize((states_BD.float() - mean_D) @ whiten_DD, dim=1)
    return unit_BD
