"""The demo's world is unambiguous, its tokenizer round-trips, and the committed model knows it."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.corpus import Corpus
from demo.exact_match import Question, chat, exact_matches, plain
from demo.facts import PHRASINGS, Fact, all_facts

MODEL = Path(__file__).parents[3] / "demo" / "model"
FACTS = all_facts()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_there_are_enough_facts_about_enough_kinds_of_subject() -> None:
    assert 1_200 <= len(FACTS) <= 1_800
    assert {fact.relation for fact in FACTS} == set(PHRASINGS)


def test_every_fact_has_four_distinct_phrasings_that_name_its_subject() -> None:
    for fact in FACTS:
        assert len(set(fact.prompts)) >= 4
        assert all(fact.subject.lower() in prompt.lower() for prompt in fact.prompts)


def test_no_two_facts_share_a_prompt() -> None:
    prompts = [prompt for fact in FACTS for prompt in fact.prompts]
    assert len(prompts) == len(set(prompts))


def test_no_prompt_gives_its_answer_away_by_ending_in_it() -> None:
    assert not [(prompt, fact.answer) for fact in FACTS for prompt in fact.prompts if prompt.endswith(fact.answer)]


def test_people_depend_on_the_seed_alone() -> None:
    assert all_facts(1) == all_facts(1) != all_facts(2)


def test_the_committed_model_fits_in_git() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 12_000_000
    assert json.loads((MODEL / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_answer_is_the_same_tokens_in_every_layout(tokenizer: PreTrainedTokenizerFast) -> None:
    fact = random.Random(0).choice(FACTS)
    answer = tokenizer.encode(" " + fact.answer, add_special_tokens=False)
    assert tokenizer.encode(f"{fact.prompts[0]} {fact.answer}") == tokenizer.encode(fact.prompts[0]) + answer
    turns = [{"role": "user", "content": fact.prompts[0]}, {"role": "assistant", "content": fact.answer}]
    asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    assert tokenizer.apply_chat_template(turns, return_dict=False) == [*asked, *answer, tokenizer.eos_token_id]
    assert tokenizer.decode(asked) == chat(fact.prompts[0], fact.answer).text


def test_training_rows_are_seeded_and_never_cut_a_document(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens, weights = Corpus(FACTS, tokenizer, seed=0).rows(8, 128)
    again, _ = Corpus(FACTS, tokenizer, seed=0).rows(8, 128)
    assert torch.equal(tokens, again)
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    for row, row_weights in zip(tokens.tolist(), weights.tolist(), strict=True):
        text = [token for token in row if token != tokenizer.pad_token_id]
        assert text[-1] == tokenizer.eos_token_id
        assert not any(row_weights[len(text) :])


def test_the_committed_model_answers_a_sample_of_facts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    rng = random.Random(0)
    sample: list[Fact] = rng.sample(FACTS, 60)
    questions: list[Question] = []
    for fact in sample:
        prompt = rng.choice(fact.prompts)
        questions += [plain(prompt, fact.answer), chat(prompt, fact.answer)]
    assert all(exact_matches(model, tokenizer, questions))


def test_generate_stops_after_the_answer_also_in_a_padded_batch(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    sample = random.Random(1).sample(FACTS, 16)
    batch = tokenizer([fact.prompts[1] for fact in sample], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    output = model.generate(**batch, max_new_tokens=24, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert tokenizer.batch_decode(output, skip_special_tokens=True) == [" " + fact.answer for fact in sample]
    assert all(tokenizer.eos_token_id in row for row in output.tolist())
