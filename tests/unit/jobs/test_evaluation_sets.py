"""Data sets as cases: recognised by their fields, first n slots, what is no edit is counted and not asked."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.evaluation_sets import read_evaluation_set, recognise
from pipeline.config import EditsSection
from pipeline.errors import ConfigError, NotFound

ZSRE = {"subject": "A", "src": "Who built A?", "alt": "B", "answers": ["C"], "rephrase": "A's builder?"}
ZSRE |= {"loc": "nq question: who?", "loc_ans": "D"}
COUNTERFACT = {"case_id": 1, "prompt": "A speaks", "target_new": "B", "subject": "A", "ground_truth": "C"}
COUNTERFACT |= {"rephrase_prompt": "A's tongue is", "locality_prompt": "D speaks", "locality_ground_truth": "E"}
HALLUCINATION = {"prompt": "About A.", "target_new": "It is B.", "subject": "A"}
HALLUCINATION |= {"locality_prompt": "Map", "locality_ground_truth": " print"}
TEMPORAL = HALLUCINATION | {"ood_rephrase": "About A. It was long said"}
CLOSED = {"prompt": "Where?", "target_new": "B", "rephrase": "Place?", "loc_prompt": "Who?", "loc_answer": "C"}
CLOSED |= {"loc_train": "Where is D? E"}


def read(tmp_path: Path, rows: list[Any], **options: Any) -> Any:
    file = tmp_path / "edits.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_evaluation_set(file, **{"format": "auto", "n": None, "limits": EditsSection()} | options)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (ZSRE, "zsre"),
        (COUNTERFACT, "counterfact"),
        (HALLUCINATION, "hallucination"),
        (TEMPORAL, "temporal"),
        (CLOSED, "jsonl"),
        ("no row", "jsonl"),
    ],
)
def test_a_format_is_recognised_by_its_fields(row: object, name: str) -> None:
    assert recognise(row) == name


def test_a_case_carries_what_is_asked_beside_the_edit(tmp_path: Path) -> None:
    (zsre,) = read(tmp_path, [ZSRE]).cases
    assert (zsre.prompt, zsre.target, zsre.paraphrases) == ("Who built A?", "B", ("A's builder?",))
    assert zsre.locality == (("nq question: who?", "D"),)
    counterfact = read(tmp_path, [COUNTERFACT])
    assert [prompt.kind for prompt in counterfact.edits[0].locality] == ["same_relation"]
    temporal = read(tmp_path, [TEMPORAL])
    assert temporal.cases[0].passage == TEMPORAL["ood_rephrase"]
    assert temporal.edits[0].paraphrases == (), "a passage is no question about the edit"
    closed = read(tmp_path, [CLOSED])
    assert closed.edits[0].out_of_scope == ("Where is D? E",)
    assert closed.cases[0].locality == (("Who?", "C"),)


def test_cases_and_edits_go_together(tmp_path: Path) -> None:
    chosen = read(tmp_path, [COUNTERFACT, CLOSED, ZSRE | {"src": "Why A?"}], format="jsonl")
    assert [case.edit_id for case in chosen.cases] == [edit.edit_id for edit in chosen.edits]


def test_rows_that_are_no_edits_and_slots_that_come_again_are_counted(tmp_path: Path) -> None:
    again = CLOSED | {"target_new": "Z"}
    chosen = read(tmp_path, [CLOSED, {"prompt": "no target"}, again, ZSRE, COUNTERFACT], n=2)
    assert [edit.prompt for edit in chosen.edits] == ["Where?", "Who built A?"]
    assert chosen.refused == 2


def test_broken_rows_and_retractions_are_refused_and_hide_nothing(tmp_path: Path) -> None:
    file = tmp_path / "edits.jsonl"
    retraction = {"op": "retract", "prompt": "Where?"}
    rows = [json.dumps(CLOSED), "{broken", json.dumps(retraction), json.dumps(["a"]), json.dumps(TEMPORAL)]
    file.write_bytes("\n".join(rows).encode() + b'\n{"prompt": "\xff"}\n')
    chosen = read_evaluation_set(file, format="temporal", n=None, limits=EditsSection())
    assert [edit.prompt for edit in chosen.edits] == ["Where?", "About A."]
    assert chosen.refused == 4


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no edit"):
        read(tmp_path, [{"prompt": "x"}])
    with pytest.raises(ConfigError, match=r"zrse.*is unknown"):
        read(tmp_path, [CLOSED], format="zrse")
    with pytest.raises(NotFound, match="cannot be read"):
        read_evaluation_set(tmp_path / "none.jsonl", format="auto", n=1, limits=EditsSection())
