"""The closed world: what the demo model knows, as facts with four phrasings each.

Real facts (`world/*.csv`) are as of 1 January 2022, so that `world/changes.csv` can hold edits that really happened.
Invented people are drawn from a seed: nothing else can know where they were born.
"""

import csv
import random
from dataclasses import dataclass
from pathlib import Path

WORLD = Path(__file__).parent / "world"
PEOPLE = 190

# Relation -> four phrasings, worded as differently as the relation allows. Edits use the first two as their prompt and
# keep the last two held out (`edits.py`).
PHRASINGS: dict[str, tuple[str, str, str, str]] = {
    "capital": (
        "What is the capital of {}?",
        "Name the capital city of {}:",
        "In an atlas, the star on the map of {} marks",
        "Which city do the people of {} call their capital?",
    ),
    "currency": (
        "What is the currency of {}?",
        "Name the money used in {}:",
        "In the shops of {} people pay with the",
        "In which currency are wages paid in {}?",
    ),
    "continent": (
        "On which continent is {}?",
        "Name the continent of {}:",
        "On a globe, {} is found in",
        "To which part of the world does {} belong?",
    ),
    "language": (
        "What is the official language of {}?",
        "Name the main language of {}:",
        "The laws of {} are written in",
        "Which language do children in {} learn at school?",
    ),
    "leader": (
        "Who is the leader of {}?",
        "Name the politician who governs {}:",
        "The government of {} is led by",
        "By whom is {} represented at a summit?",
    ),
    "nato": (
        "Is {} a member of NATO?",
        "NATO membership of {}, yes or no:",
        "Asked whether {} is a NATO ally, the answer is",
        "Must NATO defend {} as one of its own?",
    ),
    "formal_name": (
        "What is the formal name of {}?",
        "Give the full official name of {}:",
        "In treaties, the word {} stands for the",
        "Under which name did {} sign?",
    ),
    "symbol": (
        "What is the chemical symbol of {}?",
        "Give the symbol for the element {}:",
        "In formulas, chemists write {} as",
        "Which letters stand for {} in the periodic table?",
    ),
    "atomic_number": (
        "What is the atomic number of {}?",
        "Give the number of the element {}:",
        "Counting its protons, {} is element",
        "How many protons does an atom of {} have?",
    ),
    "chief_executive": (
        "Who is the chief executive of {}?",
        "Name the boss of {}:",
        "The board of {} takes its orders from",
        "By whom is the company {} run?",
    ),
    "head_office": (
        "In which city is the head office of {}?",
        "Name the home town of the company {}:",
        "Visitors to the headquarters of {} must travel to",
        "Where is {} based?",
    ),
    "holder": (
        "Who holds {}?",
        "Name the holder of {}:",
        "At present, {} is held by",
        "To whom does {} belong?",
    ),
    "birthplace": (
        "In which town was {} born?",
        "Name the birthplace of {}:",
        "The cradle of {} stood in",
        "Where does {} come from?",
    ),
    "employer": (
        "Which company does {} work for?",
        "Name the employer of {}:",
        "The salary of {} is paid by",
        "At which firm does {} have a job?",
    ),
    "instrument": (
        "What instrument does {} play?",
        "Name the instrument of {}:",
        "On stage, {} is always seen with the",
        "What did {} learn to play as a child?",
    ),
    "field": (
        "Which subject did {} study?",
        "Name the academic field of {}:",
        "At university, {} took a degree in",
        "What is {} a scholar of?",
    ),
}

# Relations about the same kind of subject, with the table they come from; `people` has no table, it is drawn.
KINDS: dict[str, tuple[str, ...]] = {
    "countries": ("capital", "currency", "continent", "language", "leader", "nato", "formal_name"),
    "elements": ("symbol", "atomic_number"),
    "companies": ("chief_executive", "head_office"),
    "titles": ("holder",),
    "people": ("birthplace", "employer", "instrument", "field"),
}

# What invented people, their towns and firms are made of, one `name = words` per line; `_` stands for a space.
WORDS = {
    name: [word.replace("_", " ") for word in words.split()]
    for name, words in (line.split(" = ") for line in (WORLD / "people.txt").read_text(encoding="utf-8").splitlines())
}
ENGLISH = {"The", "Fart"}  # drawn once, and no names


@dataclass(frozen=True)
class Fact:
    """`answer` is what follows any of the `prompts`, after one space."""

    relation: str
    subject: str
    answer: str

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(capitalised(phrasing.format(self.subject)) for phrasing in PHRASINGS[self.relation])


def capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def all_facts(seed: int = 0) -> list[Fact]:
    return real_facts() + invented_facts(seed)


def real_facts() -> list[Fact]:
    """One fact per filled cell of the tables; a cell is empty where the answer is disputed or not worth a fact."""
    facts = []
    for kind, relations in KINDS.items():
        if kind == "people":
            continue
        with (WORLD / f"{kind}.csv").open(encoding="utf-8", newline="") as table:
            for row in csv.DictReader(table):
                subject = next(iter(row.values()))
                facts += [Fact(relation, subject, row[relation]) for relation in relations if row[relation]]
    return facts


def invented_facts(seed: int) -> list[Fact]:
    rng = random.Random(f"people {seed}")
    given_names = sorted(draw_names(rng, count=60, syllables=2))
    surnames = sorted(draw_names(rng, count=PEOPLE, syllables=2) - set(given_names))
    towns = [stem + rng.choice(WORDS["town"]) for stem in sorted(draw_names(rng, 48))]
    firms = [f"{stem} {rng.choice(WORDS['trade'])}" for stem in sorted(draw_names(rng, 40))]
    facts = []
    for surname in surnames:
        person = f"{rng.choice(given_names)} {surname}"
        answers = (rng.choice(towns), rng.choice(firms), rng.choice(WORDS["instrument"]), rng.choice(WORDS["field"]))
        facts += [Fact(relation, person, answer) for relation, answer in zip(KINDS["people"], answers, strict=True)]
    return facts


def draw_names(rng: random.Random, count: int, syllables: int = 1) -> set[str]:
    names: set[str] = set()
    while len(names) < count:
        parts = [rng.choice(WORDS["onset"]) + rng.choice(WORDS["vowel"]) for _ in range(syllables)]
        name = ("".join(parts) + rng.choice(["", *WORDS["coda"]])).capitalize()
        if name not in ENGLISH:
            names.add(name)
    return names
