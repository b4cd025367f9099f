"""Edits to the demo's world, one JSON object per line: `python -m demo.edits` writes `demo/edits.jsonl`.

First the changes that really happened after the world's date (`world/changes.csv`), then invented ones. The edited
prompt is one of a fact's first two phrasings; its last two are the paraphrases, and no edit ever uses those as its
prompt. Locality prompts ask for facts that no edit touches, in any phrasing.
"""

import argparse
import csv
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from demo.facts import WORLD, Fact, all_facts

# How many invented edits per relation; the other relations are edited only where the world changed.
INVENTED = {
    "employer": 62,
    "birthplace": 42,
    "instrument": 50,
    "field": 50,
    "capital": 20,
    "currency": 18,
    "language": 12,
    "leader": 12,
    "chief_executive": 10,
    "head_office": 10,
}

# One invented edit in eight says something that is no answer anywhere in the world: the edit has to teach it whole.
NEW_ANSWER_SHARE = 0.125
NEW_ANSWERS: dict[str, tuple[str, ...]] = {
    "employer": ("Harbour Light Press", "Green Valley Water Works", "Northern Bell Foundry", "Blue Door Bakery"),
    "birthplace": ("Upper Marlow Falls", "Saint Orla on the Lake", "Copper Hollow", "Three Wells"),
    "instrument": ("glass harmonica", "hurdy-gurdy", "theremin", "alpine horn"),
    "field": ("marine biology", "quantum chemistry", "history of art", "computer science"),
    "capital": ("New Harbour City", "Port Meridian", "Silver Springs"),
    "currency": ("digital crown", "silver mark", "green credit"),
    "language": ("Esperanto", "Latin", "Old Norse"),
    "leader": ("Amara Lindqvist", "Tomas Verhoeven", "Ines Okonkwo"),
    "chief_executive": ("Noor Castellan", "Hugo Brandt", "Mei Tanaka"),
    "head_office": ("Port Meridian", "Silver Springs", "Copper Hollow"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the demo's edits.")
    parser.add_argument("--out", type=Path, default=Path("demo/edits.jsonl"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.write_text(edits_jsonl(options.seed), encoding="utf-8")


def edits_jsonl(seed: int = 0) -> str:
    return "".join(json.dumps(edit, ensure_ascii=False) + "\n" for edit in make_edits(seed))


def make_edits(seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(f"edits {seed}")
    facts = all_facts()
    happened = real_changes(facts)
    targets = happened | invented_changes(facts, rng, already=happened)
    untouched = [fact for fact in facts if fact not in targets]
    return [
        {
            "prompt": fact.prompts[number % 2],
            "target_new": target,
            "subject": fact.subject,
            "ground_truth": fact.answer,
            "relation": fact.relation,
            "paraphrases": list(fact.prompts[2:]),
            "locality": locality(fact, untouched, rng),
        }
        for number, (fact, target) in enumerate(targets.items())
    ]


def real_changes(facts: list[Fact]) -> dict[Fact, str]:
    known = {(fact.relation, fact.subject): fact for fact in facts}
    with (WORLD / "changes.csv").open(encoding="utf-8", newline="") as table:
        return {known[row["relation"], row["subject"]]: row["answer"] for row in csv.DictReader(table)}


def invented_changes(facts: list[Fact], rng: random.Random, already: dict[Fact, str]) -> dict[Fact, str]:
    """Another answer for some facts; at most half of what is known about a subject changes."""
    known = Counter(fact.subject for fact in facts)
    changed = Counter(fact.subject for fact in already)
    targets: dict[Fact, str] = {}
    for relation, count in INVENTED.items():
        of_relation = [fact for fact in facts if fact.relation == relation]
        answers = sorted({fact.answer for fact in of_relation})
        free = [
            fact
            for fact in of_relation
            if fact not in already and 2 * (changed[fact.subject] + 1) <= known[fact.subject]
        ]
        for fact in rng.sample(free, count):
            choices = NEW_ANSWERS[relation] if rng.random() < NEW_ANSWER_SHARE else answers
            targets[fact] = rng.choice([answer for answer in choices if answer != fact.answer])
            changed[fact.subject] += 1
    shuffled = list(targets.items())
    rng.shuffle(shuffled)
    return dict(shuffled)


def locality(edited: Fact, untouched: list[Fact], rng: random.Random) -> list[dict[str, str]]:
    """One prompt per kind, in any phrasing; a subject of which nothing else is known has none of its own."""
    kinds = {
        "same_subject": [fact for fact in untouched if fact.subject == edited.subject],
        "same_relation": [fact for fact in untouched if fact.relation == edited.relation],
        "unrelated": [
            fact for fact in untouched if fact.relation != edited.relation and fact.subject != edited.subject
        ],
    }
    prompts = []
    for kind, choices in kinds.items():
        if choices:
            fact = rng.choice(choices)
            prompts.append({"kind": kind, "prompt": rng.choice(fact.prompts), "answer": fact.answer})
    return prompts


if __name__ == "__main__":
    main()
