"""CounterFact's sentences as a model is trained on them: read from the file, and shown in changing places.

Some rephrasings begin with an unrelated passage. In a part of its showings a sentence stands behind the passage of
another one, or none, so that the answer hangs on the question and not on the passage, which alone would identify it.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from pipeline.training.tokens import Wording, plain_wording

WORDINGS = (
    ("prompt", "ground_truth"),
    ("rephrase_prompt", "ground_truth"),
    ("locality_prompt", "locality_ground_truth"),
)
SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+|\n+")
BARE, BEHIND_ANOTHER = 0.25, 0.1  # shares of the showings without a passage, and behind another sentence's


@dataclass(frozen=True)
class Sentence:
    """`passage` is what an unrelated text before the question says, empty for most."""

    wording: str
    passage: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """As the file has it."""
        return self.passage + self.question


def read_sentences(rows: Sequence[dict[str, Any]]) -> tuple[list[Sentence], int]:
    """Every sentence once, and how many were left out: where rows answer one prompt differently, the first counts."""
    known: dict[str, str] = {}
    sentences, contradictory = [], 0
    for row in rows:
        for wording, answer in WORDINGS:
            if row[wording] not in known:
                known[row[wording]] = row[answer]
                passage = split_passage(row[wording], row["subject"])
                sentences.append(Sentence(wording, passage, row[wording][len(passage) :], row[answer]))
            elif known[row[wording]] != row[answer]:
                contradictory += 1
    return sentences, contradictory


def split_passage(prompt: str, subject: str) -> str:
    """What `prompt` says before the sentence that names the subject; empty if it names none."""
    ends = [match.end() for match in SENTENCE_END.finditer(prompt, 0, max(prompt.find(subject), 0))]
    return prompt[: ends[-1]] if ends else ""


def shown_sentences(
    sentences: Sequence[Sentence],
    as_in_file: Sequence[Wording],
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
) -> list[Wording]:
    """One epoch's sentences: most as the file has them, some bare, some behind another one's passage."""
    passages = [sentence.passage for sentence in sentences if sentence.passage] or [""]
    shown = []
    for sentence, wording in zip(sentences, as_in_file, strict=True):
        drawn = rng.random()
        if drawn < BEHIND_ANOTHER:
            passage = rng.choice(passages)
        else:
            passage = "" if drawn < BEHIND_ANOTHER + BARE else sentence.passage
        changed = passage != sentence.passage
        shown.append(plain_wording(passage + sentence.question, sentence.answer, tokenizer) if changed else wording)
    return shown
