from typing import Any

import pytest

from pipeline.actors.field_names import canonical_fields
from pipeline.edits import Edit, LocalityPrompt, parse_edit


def edit(row: dict[str, Any]) -> Edit:
    return parse_edit(canonical_fields(row), max_prompt_chars=100, max_target_chars=100)


ZSRE = {
    "subject": "IAAF Challenge",
    "src": "When was it?",
    "pred": "2011",
    "rephrase": "When did it start?",
    "alt": "2006",
    "answers": ["1998"],
    "loc": "nq question: who?",
    "loc_ans": "him",
    "portability": {"New Question": "What?"},
}
TEMPORAL = {
    "prompt": "Tesla, Inc.,",
    "target_new": "originally",
    "subject": "Tesla",
    "ood_rephrase": "Tesla, founded",
    "locality_prompt": "Map",
    "locality_ground_truth": "l print",
}
COUNTERFACT = {
    "case_id": 0,
    "prompt": "The mother tongue of Danielle is",
    "target_new": "English",
    "subject": "Danielle",
    "ground_truth": "French",
    "rephrase_prompt": "Where Danielle is from, people speak",
    "locality_prompt": "Michel is a native speaker of",
}
ROME = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "target_new": {"str": "English"},
        "target_true": {"str": "French"},
        "subject": "Danielle",
    },
    "paraphrase_prompts": ["Where Danielle is from, people speak"],
    "neighborhood_prompts": ["Michel is a native speaker of"],
}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            ZSRE,
            Edit(
                prompt="When was it?",
                target="2006",
                subject="IAAF Challenge",
                ground_truth="1998",
                paraphrases=("When did it start?",),
                locality=(LocalityPrompt(prompt="nq question: who?"),),
            ),
        ),
        (
            TEMPORAL,
            Edit(
                prompt="Tesla, Inc.,",
                target="originally",
                subject="Tesla",
                paraphrases=("Tesla, founded",),
                locality=(LocalityPrompt(prompt="Map"),),
            ),
        ),
        (
            COUNTERFACT,
            Edit(
                prompt="The mother tongue of Danielle is",
                target="English",
                subject="Danielle",
                ground_truth="French",
                paraphrases=("Where Danielle is from, people speak",),
                locality=(LocalityPrompt(prompt="Michel is a native speaker of"),),
            ),
        ),
    ],
    ids=["zsre", "temporal", "counterfact"],
)
def test_a_published_record_becomes_the_edit_it_describes(row: dict[str, Any], expected: Edit) -> None:
    assert edit(row) == expected


def test_romes_counterfact_is_the_same_edit_with_its_neighbours_told_apart() -> None:
    flat, nested = edit(COUNTERFACT), edit(ROME)
    assert nested.model_copy(update={"locality": flat.locality}) == flat
    assert [one.kind for one in nested.locality] == ["same_relation"]


def test_our_own_names_win_and_everything_said_is_kept() -> None:
    both = edit(
        {"prompt": "our", "src": "their", "target": "ours", "alt": "theirs", "op": None, "rephrase2": ["a", "b"]}
    )
    assert (both.prompt, both.target, both.op, both.paraphrases) == ("our", "ours", "upsert", ("a", "b"))
    many = edit(
        {"src": "p", "alt": "t", "rephrase": "a", "paraphrases": ["b"], "rephrase_prompt": " ", "loc_prompt": ""}
    )
    assert (many.paraphrases, many.locality) == (("b", "a"), ())


def test_an_edit_under_our_names_stays_what_it_is() -> None:
    whole = edit(ROME).model_dump(mode="json") | {"author": "me", "op": "retract"}
    assert edit(whole).model_dump(mode="json") == whole


@pytest.mark.parametrize("row", [None, [], "text", 7])
def test_what_is_no_object_is_left_to_validation(row: object) -> None:
    assert canonical_fields(row) is row
