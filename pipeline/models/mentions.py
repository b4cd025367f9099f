"""The `subject` signal: which edits' subjects does a prompt mention?

Subjects are looked up as whole words (`normalise`d, punctuation aside) in a table, so a prompt costs the number of its
words times the length of the longest subject, however many edits there are.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.edits import normalise

WORD = re.compile(r"\w+")


class SubjectTable:
    """Subjects of the bank's entries, in its order; None where an edit has no subject."""

    def __init__(self, subjects: Sequence[str | None]) -> None:
        self._entries: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for entry, subject in enumerate(subjects):
            if subject is not None and (words := _words(subject)):
                self._entries[words].append(entry)
        self._longest = max((len(words) for words in self._entries), default=0)
        has_subject = torch.zeros(len(subjects), dtype=torch.bool)
        for entries in self._entries.values():
            has_subject[entries] = True
        self._unmentioned_E = torch.where(has_subject, -1.0, 0.0)

    def mentions(self, texts: Sequence[str]) -> Tensor:
        """B × E: +1 mentioned, −1 not mentioned, 0 where the edit has no subject."""
        values_BE = self._unmentioned_E.repeat(len(texts), 1)
        for row, text in enumerate(texts):
            words = _words(text)
            for start in range(len(words)):
                for length in range(1, min(self._longest, len(words) - start) + 1):
                    values_BE[row, self._entries.get(words[start : start + length], [])] = 1.0
        return values_BE


def _words(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(normalise(text)))
