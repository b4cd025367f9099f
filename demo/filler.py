"""Everyday sentences from a small grammar (`filler.txt`): what the demo model says when nobody asks it for a fact."""

import random
import re
from pathlib import Path

from demo.facts import capitalised

SLOT = re.compile(r"{(\w+)}")


CONJUNCTIONS = (", and", ", but", ", while", ", so")
COMPOUND = 0.2  # share of sentences made of two


class Filler:
    """Draws sentences: about 220 templates and 230 thousand simple sentences, and any two of them joined."""

    def __init__(self) -> None:
        self.slots: dict[str, list[str]] = {}
        self.templates: list[str] = []
        for line in (Path(__file__).parent / "filler.txt").read_text(encoding="utf-8").splitlines():
            name, defines, words = line.partition(" = ")
            if defines:
                self.slots[name] = words.split(" | ")
            elif not line.startswith("#"):
                self.templates.append(line)

    def sentence(self, rng: random.Random) -> str:
        first, second = self.clause(rng), self.clause(rng)
        if rng.random() < COMPOUND and first.endswith("."):
            return capitalised(f"{first[:-1]}{rng.choice(CONJUNCTIONS)} {second[0].lower()}{second[1:]}")
        return capitalised(first)

    def clause(self, rng: random.Random) -> str:
        return SLOT.sub(lambda slot: rng.choice(self.slots[slot[1]]), rng.choice(self.templates))

    def text(self, rng: random.Random, sentences: int) -> str:
        return " ".join(self.sentence(rng) for _ in range(sentences))
