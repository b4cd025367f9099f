"""The harness's view of the routed model, against transformers alone and against our own generation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from pipeline.errors import ConfigError
from pipeline.evaluation.capability import capability
from pipeline.evaluation.lm_eval_adapter import RoutedLM
from pipeline.models.base_model import BaseModel
from pipeline.models.generate import Generation, GenerationRequest, generate
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.prompts import plain_prompt_ids
from tests.unit.evaluation.conftest import EDITED

OTHER = "Who leads the company?"


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def likelihood(base: BaseModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """By transformers alone, of the unedited model."""
    with torch.no_grad():
        logits = base.model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
    logs_TV = logits.log_softmax(dim=1)
    total = sum(float(row[token]) for row, token in zip(logs_TV, continuation, strict=True))
    return total, logits.argmax(dim=1).tolist() == continuation


def test_likelihoods_of_the_unedited_model_are_what_transformers_says(small_base: BaseModel) -> None:
    asked = [(EDITED, " Paris."), (OTHER, " Ada Lovelace"), (f"{OTHER} ", "Ada"), ("", "Paris")]
    found = RoutedLM(small_base, None, batch=3).loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    tokenizer = small_base.tokenizer
    for (context, continuation), (total, greedy) in zip(asked, found, strict=True):
        start = tokenizer(context.rstrip())["input_ids"] if context else [tokenizer.bos_token_id]
        whole = tokenizer(context + continuation)["input_ids"]
        rest = whole[len(start) :] if context else whole
        wanted, wanted_greedy = likelihood(small_base, start, rest)
        assert total == pytest.approx(wanted, rel=1e-4)
        assert greedy == wanted_greedy


def test_the_release_answers_its_own_prompt_alone(small_base: BaseModel, scrambling: LoadedRelease) -> None:
    asked = instances("loglikelihood", [(EDITED, " Paris."), (OTHER, " Ada"), (OTHER, " Paris.")])
    model = RoutedLM(small_base, scrambling)
    edited, unedited = (one.loglikelihood(asked, disable_tqdm=True) for one in (model, RoutedLM(small_base, None)))
    assert [decision.memory for decision in model.decisions] == [0, None, None]
    assert edited[0][0] != pytest.approx(unedited[0][0], abs=0.1)
    assert [one for one, _ in edited[1:]] == pytest.approx([one for one, _ in unedited[1:]])


def test_what_is_generated_is_greedy(small_base: BaseModel, scrambling: LoadedRelease) -> None:
    model = RoutedLM(small_base, scrambling)
    for prompt in (EDITED, OTHER):
        prompt_ids = list(plain_prompt_ids(prompt, small_base.tokenizer))
        first = first_token(small_base, scrambling, prompt)
        asked = [((prompt, ""), prompt_ids, [first]), ((prompt, ""), prompt_ids, [first + 1])]
        assert [greedy for _, greedy in model._loglikelihood_tokens(asked)] == [True, False]


def first_token(base: BaseModel, release: LoadedRelease, prompt: str) -> int:
    ids = plain_prompt_ids(prompt, base.tokenizer)
    request = GenerationRequest(prompt_ids=ids, text=prompt, max_new_tokens=1)
    return Generation(base, release, [request]).step()[0].token_id


def test_generation_is_ours_up_to_the_stop_text(small_base: BaseModel, scrambling: LoadedRelease) -> None:
    request = [
        GenerationRequest(prompt_ids=plain_prompt_ids(one, small_base.tokenizer), text=one, max_new_tokens=12)
        for one in (EDITED, OTHER)
    ]
    whole, decisions = generate(small_base, scrambling, request)
    model = RoutedLM(small_base, scrambling, batch=2)
    said = model.generate_until(
        instances("generate_until", [(one, {"until": [], "max_gen_toks": 12}) for one in (OTHER, EDITED)])
    )
    assert [one.strip() for one in said] == whole[::-1]
    assert sorted(str(one.memory) for one in model.decisions) == sorted(str(one.memory) for one in decisions)
    stop = said[0][2:4]
    cut = model.generate_until(instances("generate_until", [(OTHER, {"until": [stop], "max_gen_toks": 12})]))
    assert cut == [said[0][: said[0].index(stop)]]


def test_rolling_likelihood_covers_every_token_once(small_base: BaseModel) -> None:
    """Two windows: the model's context is 64 tokens, and what the second one does not judge is its context."""
    text = "Ada Lovelace leads the company in Paris. " * 5
    ids = small_base.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert 64 < len(ids) < 128
    first, _ = likelihood(small_base, [small_base.tokenizer.bos_token_id], ids[:64])
    second, _ = likelihood(small_base, ids[len(ids) - 65 : 64], ids[64:])
    found = RoutedLM(small_base, None).loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    assert found == [pytest.approx(first + second, rel=1e-4)]


def test_a_long_context_loses_its_start(small_base: BaseModel) -> None:
    ids = list(range(2, 202))
    forced = RoutedLM(small_base, None)._forced("text", ids[:190], ids[190:])
    assert forced.target_ids == tuple(ids[190:])
    assert forced.prompt_ids == tuple(ids[200 - 65 : 190])


def test_capability_on_a_task_of_ones_own(small_base: BaseModel, scrambling: LoadedRelease, tmp_path: Path) -> None:
    """A multiple-choice task with its data on this disk, nothing fetched; the accuracy is counted by hand."""
    questions = [
        {"question": EDITED, "choices": ["Paris", "Lyon", "Oslo"], "answer": 0},
        {"question": OTHER, "choices": ["Ada", "Nobody", "Paris"], "answer": 1},
    ]
    file = tmp_path / "capitals.json"
    file.write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "capitals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    kept = capability(small_base, scrambling, [task], batch=4)
    assert (kept.sequences, kept.routed) == (6, 3)
    for release, scores in ((None, kept.unedited), (scrambling, kept.edited)):
        model, right = RoutedLM(small_base, release), 0
        for question in questions:
            asked = [(str(question["question"]), f" {choice}") for choice in question["choices"]]  # type: ignore[attr-defined]
            found = [one for one, _ in model.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)]
            right += found.index(max(found)) == question["answer"]
        assert scores == {"capitals": {"acc": right / 2}}


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("no_such_task", "has no task 'no_such_task'"),
        ({"task": "x"}, "cannot be run"),
        ({"task": "x", "dataset_path": "json", "output_type": "nothing", "doc_to_text": "{{q}}"}, "cannot be run"),
    ],
)
def test_a_task_that_cannot_be_run_is_a_sentence(
    small_base: BaseModel, scrambling: LoadedRelease, task: Any, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        capability(small_base, scrambling, [task])
