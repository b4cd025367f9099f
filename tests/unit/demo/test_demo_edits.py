"""The demo's edits change facts, and nothing that measures their side effects is touched by another edit."""

import json
from pathlib import Path

from demo.edits import edits_jsonl, make_edits, real_changes
from demo.facts import all_facts

DEMO = Path(__file__).parents[3] / "demo"
EDITS = make_edits()
FACT_OF = {prompt: fact for fact in all_facts() for prompt in fact.prompts}
EDITED = {FACT_OF[edit["prompt"]] for edit in EDITS}


def test_the_committed_edits_are_the_ones_the_function_writes() -> None:
    assert (DEMO / "edits.jsonl").read_text(encoding="utf-8") == edits_jsonl()


def test_each_edit_changes_one_fact_and_no_fact_is_edited_twice() -> None:
    assert len(EDITS) == len(EDITED) >= 300
    for edit in EDITS:
        fact = FACT_OF[edit["prompt"]]
        assert (edit["subject"], edit["relation"], edit["ground_truth"]) == (fact.subject, fact.relation, fact.answer)
        assert edit["target_new"] not in ("", edit["ground_truth"])


def test_several_edits_are_real_changes_of_the_world() -> None:
    happened = real_changes(all_facts())
    assert len(happened) >= 20
    assert happened.items() <= {FACT_OF[edit["prompt"]]: edit["target_new"] for edit in EDITS}.items()


def test_paraphrases_ask_for_the_edited_fact_in_words_no_edit_uses() -> None:
    for edit in EDITS:
        fact = FACT_OF[edit["prompt"]]
        assert len(set(edit["paraphrases"])) >= 2
        assert {FACT_OF[paraphrase] for paraphrase in edit["paraphrases"]} == {fact}
    held_out = {FACT_OF[p].prompts.index(p) for edit in EDITS for p in edit["paraphrases"]}
    edited = {FACT_OF[edit["prompt"]].prompts.index(edit["prompt"]) for edit in EDITS}
    assert not held_out & edited


def test_locality_prompts_ask_for_facts_that_no_edit_touches() -> None:
    for edit in EDITS:
        for probe in edit["locality"]:
            fact = FACT_OF[probe["prompt"]]
            assert fact not in EDITED
            assert probe["answer"] == fact.answer
            assert (probe["kind"] == "same_subject") == (fact.subject == edit["subject"])
            assert (probe["kind"] == "same_relation") == (fact.relation == edit["relation"])


def test_every_kind_of_locality_is_well_measured() -> None:
    kinds = [probe["kind"] for edit in EDITS for probe in edit["locality"]]
    assert min(kinds.count(kind) for kind in ("same_subject", "same_relation", "unrelated")) >= 300


def test_bad_rows_are_bad_in_different_ways() -> None:
    reasons = []
    for line in (DEMO / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            reasons.append("broken")
            continue
        if row.get("op", "upsert") != "upsert":
            reasons.append("unknown op")
        elif not isinstance(row["prompt"], str):
            reasons.append("prompt is no text")
        elif not row["prompt"] or not row["target_new"]:
            reasons.append("empty " + ("prompt" if not row["prompt"] else "target"))
        elif row["prompt"] == row["target_new"]:
            reasons.append("target is the prompt")
    assert len(set(reasons)) == len(reasons) == 6
