"""The CounterFact model, on a made-up file: what it is trained on, and that the saved folder answers it."""

import json
import random
from pathlib import Path

import pytest

from benchmarks import pretrain_counterfact
from benchmarks.counterfact_sentences import Sentence, read_sentences, shown_sentences, split_passage
from pipeline.config import ModelSection
from pipeline.models.base_model import load_base_model
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.prompts import plain_prompt_ids
from pipeline.training.tokens import plain_wording

ROWS = [
    {
        "case_id": number,
        "prompt": f"The mother tongue of {subject} is",
        "rephrase_prompt": f"{passage}{subject} is a native speaker of",
        "locality_prompt": f"{other} speaks",
        "subject": subject,
        "target_new": "Welsh",
        "ground_truth": answer,
        "locality_ground_truth": answer,
    }
    for number, (subject, other, answer, passage) in enumerate(
        [
            ("Ada Brook", "Tom Reed", "French", ""),
            ("Ben Carr", "Una Vale", "Low German", "It closed in 1969. "),
            ("Cy Dunn", "Vic Wood", "Tamil", "References\n\n"),
        ]
    )
]


def test_every_sentence_once_and_the_first_answer_counts() -> None:
    again = {**ROWS[0], "ground_truth": "Dutch"}  # both wordings contradict row 0; the locality prompt repeats it
    sentences, contradictory = read_sentences([*ROWS, again])
    assert contradictory == 2
    assert {sentence.prompt: sentence.answer for sentence in sentences} == {
        row[prompt]: row["ground_truth"] for row in ROWS for prompt in ("prompt", "rephrase_prompt", "locality_prompt")
    }
    assert len(sentences) == 9


@pytest.mark.parametrize(
    ("prompt", "passage"),
    [
        ("Ada Brook speaks", ""),
        ("It closed. Ada Brook speaks", "It closed. "),
        ("One. Two!\n Ada Brook, a native", "One. Two!\n "),
        ("Born in 3.14 places Ada Brook speaks", ""),
        ("One. What of Ada Brook? She speaks", "One. "),
        ("Nobody. He speaks", ""),
    ],
)
def test_the_passage_ends_before_the_sentence_with_the_subject(prompt: str, passage: str) -> None:
    assert split_passage(prompt, "Ada Brook") == passage


def test_what_is_shown_is_the_same_question_and_answer_in_another_place() -> None:
    sentences, _ = read_sentences(ROWS)
    tokenizer = pretrain_counterfact.train_tokenizer(sentences)
    as_in_file = [plain_wording(sentence.prompt, sentence.answer, tokenizer) for sentence in sentences]
    shown = shown_sentences(sentences, as_in_file, tokenizer, random.Random(0))
    for sentence, wording in zip(sentences, shown, strict=True):
        text = tokenizer.decode(wording.prompt_ids, skip_special_tokens=True).removeprefix(" ")
        assert text.endswith(sentence.question)
        assert text.removesuffix(sentence.question) in {"", "It closed in 1969. ", "References\n\n"}
        assert tokenizer.decode(wording.target_ids) == f" {sentence.answer}</s>"


def test_it_learns_a_small_file_and_the_folder_answers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "facts.json", tmp_path / "model"
    data.write_text(json.dumps(ROWS))
    monkeypatch.setattr(pretrain_counterfact, "WARM_UP", 5)
    monkeypatch.setattr(pretrain_counterfact, "TOKENS_PER_STEP", 64)
    monkeypatch.setattr("sys.argv", ["pretrain", str(out), "--data", str(data), "--epochs", "40", "--json"])
    pretrain_counterfact.main()

    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((out / "training.json").read_text())
    assert printed["exact"] == {"prompt": 1.0, "rephrase_prompt": 1.0, "locality_prompt": 1.0}

    base = load_base_model(ModelSection(path=str(out)))
    asked: list[Sentence] = read_sentences(ROWS)[0]
    requests = [
        GenerationRequest(
            prompt_ids=plain_prompt_ids(sentence.prompt, base.tokenizer), text=sentence.prompt, max_new_tokens=8
        )
        for sentence in asked
    ]
    answers, _ = generate(base, None, requests)
    assert answers == [sentence.answer for sentence in asked]
    assert base.tokenizer.padding_side == "left"
    assert all(request.prompt_ids[0] == base.tokenizer.bos_token_id for request in requests)
