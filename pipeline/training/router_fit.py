"""Fit and calibrate the router of one release.

The weights come from `wise/calibration.py`: what paraphrases look like is known from elsewhere, and the release adds
what it can show. The threshold is the release's own: the lowest that lets at most the stated share of *each* kind of
negative pass (`router_negatives.py`). Entries whose subject is unknown are calibrated apart, by a bias of their own.

Paraphrases the edits carry are held out and are never used here.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor

from pipeline.config import RouterSection
from pipeline.models.base_model import BaseModel
from pipeline.models.encoder import Encoder, wanted_encoder
from pipeline.models.readings import TextReader
from pipeline.storage.bank import BankEntry
from pipeline.training.prompt_reader import PromptReader
from pipeline.training.router_negatives import MOST_QUERIES, Found, Questions, find_questions
from pipeline.wise.calibration import (
    PRIOR,
    PRIOR_PRECISION,
    PRIOR_WITHOUT_ENCODER,
    fit_logistic,
    threshold_at,
)
from pipeline.wise.routing import SIGNALS, Match, Router, empty_router, whitened, whitening

MARGIN = 0.05  # of the way from the negatives to the edits' own wordings: users ask in more ways than calibration knows
LOGITS_BELOW_OWN = 2.0
SHARE_OF_OWN = 0.8  # measured on the first one and two edits of the demo (docs/experiments.md)


@dataclass(frozen=True)
class Calibration:
    """What the report draws: best scores in and out of scope."""

    positive_scores: list[float]
    negative_scores: dict[str, list[float]]


def fit_router(
    base: BaseModel,
    entries: Sequence[BankEntry],
    states: Sequence[Tensor],
    *,
    unrelated: Sequence[str],
    section: RouterSection,
    seed: int,
    embedded: Mapping[str, Tensor] | None = None,
    model: PromptReader | None = None,
) -> tuple[Router, Calibration]:
    """`states[e]`: W × D states of entry e's wordings, the bare one first. A single edit is calibrated on the unrelated
    texts alone; without any edit the router reaches nothing. `embedded`: texts that need not be encoded again; `model`:
    one that has read some of the questions before.

    Raises ConfigError when a signal is demanded that needs the sentence encoder and it is not installed.
    """
    if not entries:
        return empty_router(int(base.model.config.hidden_size)), Calibration([], {})
    encoder = wanted_encoder(section)
    reader = TextReader(entries, encoder, embedded=embedded)
    model = model or PromptReader(base)
    router = _bank(model, entries, states, unrelated=unrelated, reader=reader, encoder=encoder)
    router = replace(router, weights_S=_prior(section, encoder))
    found = find_questions(model, router, reader, entries, states, unrelated=unrelated, seed=seed)
    router = _moved_by_paraphrases(router, reader, found)
    router = _calibrated_apart(router, reader, found.negatives, rate=section.false_positive_rate)
    scores = {
        name: torch.tensor([match.score for match in _best(router, reader, kind)])
        for name, kind in found.negatives.items()
    }
    limits = [
        threshold_at(scores[name], false_positive_rate=section.false_positive_rate, asked=kind.asked)
        for name, kind in found.negatives.items()
    ]
    asked = sorted(random.Random(seed).sample(range(len(entries)), min(len(entries), MOST_QUERIES)))
    own = _own_scores(router, reader, entries, states, asked=asked)
    finite = [limit for limit in limits if isfinite(limit)]
    # Without a single negative the edits' own wordings are all there is to go by.
    threshold = max(finite) if finite else min(own) - LOGITS_BELOW_OWN
    threshold += MARGIN * max(min(own) - threshold, 0.0)
    if "swapped" not in found.negatives:
        # Too few edits to ask anything else about their subjects, which is what comes nearest.
        threshold = max(threshold, SHARE_OF_OWN * min(own))
    calibration = Calibration(
        positive_scores=own,
        negative_scores={name: kind.tolist() for name, kind in scores.items()},
    )
    return replace(router, threshold=threshold), calibration


def _prior(section: RouterSection, encoder: Encoder | None) -> Tensor:
    weights = PRIOR if encoder else PRIOR_WITHOUT_ENCODER
    on = SIGNALS if section.signals == "auto" else section.signals
    return torch.tensor([weight if name in on else 0.0 for name, weight in zip(SIGNALS, weights, strict=True)])


def _bank(
    model: PromptReader,
    entries: Sequence[BankEntry],
    states: Sequence[Tensor],
    *,
    unrelated: Sequence[str],
    reader: TextReader,
    encoder: Encoder | None,
) -> Router:
    """The router's tensors, before anything is fitted. A model that writes nothing by itself leaves no unrelated text;
    the mean is then over the edits."""
    mean_D = (model.read(unrelated).states_ND if unrelated else torch.cat(list(states))).mean(dim=0)
    whiten_DD = whitening(torch.cat([states_WD - states_WD.mean(dim=0) for states_WD in states]))
    asked_EM, relation_EM = reader.embeddings()
    return Router(
        mean_D=mean_D,
        whiten_DD=whiten_DD,
        keys_ND=whitened(torch.cat(list(states)), mean_D, whiten_DD),
        entry_N=torch.cat([torch.full((len(rows),), index) for index, rows in enumerate(states)]),
        memory_E=torch.tensor([entry.memory for entry in entries]),
        asked_EM=asked_EM,
        relation_EM=relation_EM,
        weights_S=torch.zeros(len(SIGNALS)),
        bias_E=torch.zeros(len(entries)),
        threshold=0.0,
        encoder=encoder.fingerprint if encoder else "",
    )


def _best(router: Router, reader: TextReader, questions: Questions) -> list[Match]:
    return router.match(questions.states_BD, reader.read(questions.texts), hidden=questions.hidden)


def _moved_by_paraphrases(router: Router, reader: TextReader, found: Found) -> Router:
    """Weights moved to what the release's own paraphrases show, as far as there are any."""
    if found.paraphrases is None:
        return router
    asked = found.paraphrases
    inside_PS = torch.stack(
        [
            router.signals_of(state_D, reading, entry)
            for state_D, reading, entry in zip(asked.states_BD, reader.read(asked.texts), asked.right, strict=True)
        ]
    )
    outside = [match.signals for kind in found.negatives.values() for match in _best(router, reader, kind)]
    weights_S, _ = fit_logistic(
        inside_PS,
        torch.tensor([signals for signals in outside if signals]),
        prior_S=router.weights_S,
        pull=PRIOR_PRECISION / len(inside_PS),
    )
    return replace(router, weights_S=weights_S)


def _calibrated_apart(router: Router, reader: TextReader, negatives: Mapping[str, Questions], *, rate: float) -> Router:
    """A bias for entries whose subject is unknown, so that they too let only the stated share pass: the subject speaks
    neither for nor against them, so their scores lie elsewhere."""
    if bool(reader.known_E.all()) or not bool(reader.known_E.any()):
        return router
    limits = []
    for others_E in (reader.known_E, ~reader.known_E):
        alone = replace(router, bias_E=router.bias_E.masked_fill(others_E, float("-inf")))
        of_kind = []
        for kind in negatives.values():
            scores = torch.tensor([match.score for match in _best(alone, reader, kind)])
            of_kind.append(threshold_at(scores, false_positive_rate=rate, asked=kind.asked))
        limits.append(max(of_kind))
    limit_unknown, limit_known = limits
    if not torch.isfinite(torch.tensor(limits)).all():
        return router
    bias_E = torch.where(reader.known_E, 0.0, limit_known - limit_unknown)
    return replace(router, bias_E=bias_E)


def _own_scores(
    router: Router,
    reader: TextReader,
    entries: Sequence[BankEntry],
    states: Sequence[Tensor],
    *,
    asked: Sequence[int],
) -> list[float]:
    """Scores of every wording of the `asked` entries but the bare one (unless it is the only one) against its edit's
    bare wording. Their texts end with the bare prompt, so the text signals are those of the prompt."""
    scores = []
    for entry, reading in zip(asked, reader.read([entries[entry].prompt for entry in asked]), strict=True):
        keys_WD = whitened(states[entry], router.mean_D, router.whiten_DD)
        text_S = router.signals_of(states[entry][0], reading, entry)
        cosine_W = (keys_WD[1:] if len(keys_WD) > 1 else keys_WD) @ keys_WD[0]
        for cosine in cosine_W:
            signals_S = torch.cat([cosine[None], text_S[1:]])
            scores.append(float(signals_S @ router.weights_S + router.bias_E[entry]))
    return scores
