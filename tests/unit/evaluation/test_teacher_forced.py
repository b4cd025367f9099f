"""Token accuracy, agreement and perplexity: against logits computed by transformers alone, and against generation."""

import math

import pytest
import torch

from pipeline.evaluation.teacher_forced import CLIP, Perplexity, perplexity, token_accuracy, token_agreement
from pipeline.models.base_model import BaseModel
from pipeline.models.loaded_release import LoadedRelease
from tests.unit.evaluation.conftest import EDITED

PAIRS = [(EDITED, "Paris today"), ("Who leads the company?", "Ada Lovelace leads it."), ("東京", "Tokyo")]


def by_transformers(small_base: BaseModel, prompt: str, answer: str) -> tuple[list[int], torch.Tensor]:
    """The answer's ids and the unedited model's log-probabilities T × V where they stand."""
    prompt_ids = small_base.tokenizer(prompt)["input_ids"]
    ids = small_base.tokenizer(f"{prompt} {answer}")["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids
    with torch.no_grad():
        logits = small_base.model(torch.tensor([ids])).logits[0, len(prompt_ids) - 1 : -1]
    return ids[len(prompt_ids) :], logits.log_softmax(dim=1)


def test_accuracy_and_perplexity_of_the_unedited_model_are_what_transformers_says(small_base: BaseModel) -> None:
    shares, losses = [], []
    for pair in PAIRS:
        ids, logs_TV = by_transformers(small_base, *pair)
        shares.append(sum(int(row.argmax()) == token for row, token in zip(logs_TV, ids, strict=True)) / len(ids))
        losses.append([-float(row[token]) for row, token in zip(logs_TV, ids, strict=True)])
    accuracy, surprise = token_accuracy(small_base, None, PAIRS), perplexity(small_base, None, PAIRS, batch=2)
    assert accuracy.per_pair == tuple(shares)
    assert accuracy.mean == pytest.approx(sum(shares) / 3)
    assert surprise.per_pair == pytest.approx([math.exp(sum(loss) / len(loss)) for loss in losses], rel=1e-3)
    tokens = [one for loss in losses for one in loss]
    assert surprise.overall == pytest.approx(math.exp(sum(tokens) / len(tokens)), rel=1e-3)


def test_agreement_is_the_share_of_places_where_both_find_the_same_token(
    small_base: BaseModel, scrambling: LoadedRelease
) -> None:
    routed = token_agreement(small_base, scrambling, PAIRS)
    assert routed.routed == (True, False, False)
    assert routed.per_pair[0] is not None and routed.per_pair[0] < 1
    assert routed.per_pair[1:] == (1.0, 1.0)
    assert token_agreement(small_base, None, PAIRS).mean == 1


def test_the_edit_changes_accuracy_and_perplexity_of_its_own_prompt_alone(
    small_base: BaseModel, scrambling: LoadedRelease
) -> None:
    edited, unedited = perplexity(small_base, scrambling, PAIRS), perplexity(small_base, None, PAIRS)
    assert edited.per_pair[0] != pytest.approx(unedited.per_pair[0])
    assert edited.per_pair[1:] == pytest.approx(unedited.per_pair[1:])
    assert (
        token_accuracy(small_base, scrambling, PAIRS).per_pair[1:]
        == token_accuracy(small_base, None, PAIRS).per_pair[1:]
    )


def test_what_does_not_fit_the_context_is_not_asked(small_base: BaseModel, scrambling: LoadedRelease) -> None:
    pairs = [("東京 " * 64, "Tokyo"), PAIRS[0], ("Paris", " ")]
    alone = token_accuracy(small_base, scrambling, PAIRS[:1])
    shares = token_accuracy(small_base, scrambling, pairs)
    assert (shares.per_pair[0], shares.per_pair[1], shares.mean) == (None, alone.mean, alone.mean)
    assert token_accuracy(small_base, scrambling, []).mean is None
    assert perplexity(small_base, scrambling, pairs[:1]) == Perplexity((None,), None)


def test_the_literatures_perplexity_is_clipped_per_passage() -> None:
    assert Perplexity(per_pair=(1.0, 1e9, None), overall=3.0).mean_clipped == (1 + CLIP) / 2
