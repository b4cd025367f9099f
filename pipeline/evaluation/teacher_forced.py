"""The literature's metrics, computed with the answer given: token accuracy, token agreement and perplexity.

They are kinder than greedy exact match: an answer whose first token is wrong still counts for its other tokens, and
running on past the answer's end costs nothing, since the end-of-sequence token is not asked. So they stand beside exact
match and never in its place. The routed model is asked exactly as it serves (`teacher_force`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.models.base_model import BaseModel
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.prompts import answer_ids, plain_prompt_ids
from pipeline.models.teacher_forcing import ForcedAnswer, ForcedRequest, teacher_force

CLIP = 100.0  # EasyEdit's cap on the perplexity of one passage

Pairs = Sequence[tuple[str, str]]
"""Prompts with the answer that is given behind each."""


@dataclass(frozen=True)
class TokenShares:
    """Per pair the share of the answer's tokens; None where prompt and answer do not fit the model's context, or the
    answer has no token."""

    per_pair: tuple[float | None, ...]
    routed: tuple[bool, ...]

    @property
    def mean(self) -> float | None:
        """Over the pairs that have a share, each counting once, however long its answer."""
        asked = [share for share in self.per_pair if share is not None]
        return sum(asked) / len(asked) if asked else None


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of each answer (None as in TokenShares), and of all their tokens together."""

    per_pair: tuple[float | None, ...]
    overall: float | None  # exp of the mean negative log-likelihood per token

    @property
    def mean_clipped(self) -> float | None:
        """What EasyEdit reports for hallucination: the mean over the passages, each at most CLIP."""
        asked = [min(value, CLIP) for value in self.per_pair if value is not None]
        return sum(asked) / len(asked) if asked else None


def token_accuracy(base: BaseModel, release: LoadedRelease | None, pairs: Pairs, *, batch: int = 32) -> TokenShares:
    """Share of the answer's tokens that are the likeliest at their place: reliability and generalization."""
    requests = _requests(base, pairs)
    answers = _force(base, release, requests, batch=batch)
    right = [
        answer.agrees(request.target_ids) if request and answer else None
        for request, answer in zip(requests, answers, strict=True)
    ]
    return _shares(right, answers)


def token_agreement(base: BaseModel, release: LoadedRelease | None, pairs: Pairs, *, batch: int = 32) -> TokenShares:
    """Share of places along the answer where the release and the unedited model find the same token likeliest:
    locality. The answer is the true one, as in EasyEdit, and whether either model knows it does not matter."""
    requests = _requests(base, pairs)
    edited = _force(base, release, requests, batch=batch)
    unedited = _force(base, None, requests, batch=batch)
    same = [
        one.agrees(other.argmax_ids) if one and other else None for one, other in zip(edited, unedited, strict=True)
    ]
    return _shares(same, edited)


def token_confidence(
    base: BaseModel, release: LoadedRelease | None, pairs: Pairs, *, above: float, batch: int = 32
) -> TokenShares:
    """Share of the answer's tokens that are given a probability above `above`: EasyEdit's measure on natural text about
    an edit (temporal), there with 0.8 and over the whole text."""
    answers = _force(base, release, _requests(base, pairs), batch=batch)
    sure = [None if answer is None else (answer.log_probabilities_T > math.log(above)).tolist() for answer in answers]
    return _shares(sure, answers)


def perplexity(base: BaseModel, release: LoadedRelease | None, pairs: Pairs, *, batch: int = 32) -> Perplexity:
    """How surprised the routed model is by the answers, in the paper's measure for hallucination."""
    answers = _force(base, release, _requests(base, pairs), batch=batch)
    losses = [None if answer is None else -answer.log_probabilities_T.double() for answer in answers]
    tokens = sum(len(loss_T) for loss_T in losses if loss_T is not None)
    nats = sum(float(loss_T.sum()) for loss_T in losses if loss_T is not None)
    return Perplexity(
        per_pair=tuple(None if loss_T is None else _exp(float(loss_T.mean())) for loss_T in losses),
        overall=_exp(nats / tokens) if tokens else None,
    )


def _requests(base: BaseModel, pairs: Pairs) -> list[ForcedRequest | None]:
    requests: list[ForcedRequest | None] = []
    for prompt, answer in pairs:
        request = ForcedRequest(
            prompt_ids=plain_prompt_ids(prompt, base.tokenizer),
            target_ids=answer_ids(prompt, answer, base.tokenizer),
            text=prompt,
        )
        fits = len(request.prompt_ids) + len(request.target_ids) <= base.max_tokens
        requests.append(request if request.prompt_ids and request.target_ids and fits else None)
    return requests


def _force(
    base: BaseModel, release: LoadedRelease | None, requests: Sequence[ForcedRequest | None], *, batch: int
) -> list[ForcedAnswer | None]:
    """None where there is no request."""
    answers = iter(teacher_force(base, release, [request for request in requests if request], batch=batch))
    return [next(answers) if request else None for request in requests]


def _shares(agreeing: Sequence[list[bool] | None], answers: Sequence[ForcedAnswer | None]) -> TokenShares:
    return TokenShares(
        per_pair=tuple(None if held is None else sum(held) / len(held) for held in agreeing),
        routed=tuple(answer is not None and answer.decision.memory is not None for answer in answers),
    )


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # the largest float64 is about e^709
