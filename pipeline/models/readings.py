"""What the text signals see of a prompt: the subjects it mentions, and what it asks as the sentence encoder puts it.

Only the end of a prompt is read (`questions.py`). A prompt that mentions no subject there but points back ("and where
was she born?") is read with the last subject named just before, as a part of a mention: so a follow-up question can
reach an edit, if it also asks what the edit asks.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.models.encoder import Encoder
from pipeline.models.mentions import PARTLY, WHOLE, Mention, SubjectIndex, likely_subject
from pipeline.models.questions import asked, before_asked
from pipeline.storage.bank import BankEntry
from pipeline.wise.routing import Reading, Router

MASK = "X"  # measured against "it" and nothing: it tells relations apart best
JOINT = re.compile(r"\s*(?:[,;?]|\b(?:and|or|but)\b)\s+", re.IGNORECASE)  # parts of a question meet there
POINTS_BACK = re.compile(r"\b(?:he|she|they|it|his|her|hers|its|their|theirs|him|them)\b", re.IGNORECASE)


class TextReader:
    """Reads prompts for one bank. Without an encoder only subjects are read. `embedded`: what an earlier release knows
    of this encoder's embeddings, in half precision; those texts are not encoded again for the bank."""

    def __init__(
        self, entries: Sequence[BankEntry], encoder: Encoder | None, *, embedded: Mapping[str, Tensor] | None = None
    ) -> None:
        self._encoder = encoder
        self._embedded = embedded or {}
        self._bank: dict[str, Tensor] = {}  # half precision
        self._asked = [asked(entry.prompt) for entry in entries]
        self.subjects = [_subject(entry, end) for entry, end in zip(entries, self._asked, strict=True)]
        self._index = SubjectIndex(self.subjects)
        self.known_E = torch.tensor([entry in self._index.known for entry in range(len(entries))], dtype=torch.bool)

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """E × M of the edits' prompts, bare and with their subject masked; half precision. M is 0 without encoder.

        Each text is encoded alone: a release has the same bytes, whichever of its texts an earlier one had. What is
        read from now on takes the bank's own texts from here: a router is calibrated on thousands of them."""
        encoder = self._encoder
        if encoder is None or not self._asked:
            empty = torch.zeros(len(self._asked), 0, dtype=torch.float16)
            return empty, empty
        asked, masked = self._asked, self.masked()
        self._bank = {
            text: self._embedded[text] if text in self._embedded else encoder.encode([text])[0].half()
            for text in dict.fromkeys([*asked, *masked])
        }
        return torch.stack([self._bank[text] for text in asked]), torch.stack([self._bank[text] for text in masked])

    def masked(self) -> list[str]:
        """What each edit asks, with its subject masked where its prompt names it."""
        texts = []
        for entry, text in enumerate(self._asked):
            own = next((mention for mention in self._index.mentions(text) if entry in mention.entries), None)
            texts.append(_masked(text, own) if own else text)
        return texts

    def texts_of(self, router: Router) -> dict[str, Tensor]:
        """The texts that this bank's router holds embeddings of, and these. Which part of a prompt is masked depends on
        the whole bank, and a router that grew keeps the embeddings of before: a text with two of them is left out."""
        known = dict(zip(self._asked, router.asked_EM, strict=True))
        twice = {
            text
            for text, vector in zip(self.masked(), router.relation_EM, strict=True)
            if not torch.equal(known.setdefault(text, vector), vector)
        }
        return {text: vector for text, vector in known.items() if text not in twice}

    def read(self, texts: Sequence[str]) -> list[Reading]:
        return [self._read(text) for text in texts]

    def mentions_a_subject(self, text: str) -> bool:
        """Anywhere in the text, also in part."""
        return bool(self._index.mentions(text))

    def _read(self, text: str) -> Reading:
        end = asked(text)
        mentions = self._index.mentions(end)
        if not mentions and (pointer := POINTS_BACK.search(end)):
            mentions = self._pointed_at(before_asked(text), pointer)
        best: dict[int, Mention] = {}
        for mention in mentions:
            for entry in mention.entries:
                if entry not in best or mention.value > best[entry].value:
                    best[entry] = mention
        entries = sorted(best)
        masked = {mention: _masked(*_clause(end, mention, mentions)) for mention in best.values()}
        variants = list(dict.fromkeys(masked.values()))
        rows = {variant: row for row, variant in enumerate(variants)}
        return Reading(
            known_E=self.known_E,
            entries_C=torch.tensor(entries, dtype=torch.long),
            subject_C=torch.tensor([best[entry].value for entry in entries]),
            masked_C=torch.tensor([rows[masked[best[entry]]] for entry in entries], dtype=torch.long),
            asked_M=self._encoded([end])[0] if self._encoder else torch.zeros(0),
            masked_RM=self._encoded(variants) if self._encoder else torch.zeros(0, 0),
        )

    def _encoded(self, texts: Sequence[str]) -> Tensor:
        assert self._encoder is not None
        alone = {text: self._encoder.encode([text])[0] for text in texts if text not in self._bank}
        vectors = [alone[text] if text in alone else self._bank[text].float() for text in texts]
        return torch.stack(vectors) if vectors else torch.zeros(0, self._encoder.width)

    def _pointed_at(self, context: str, pointer: re.Match[str]) -> list[Mention]:
        whole = [mention for mention in self._index.mentions(context) if mention.value == WHOLE]
        if not whole:
            return []
        last = max(whole, key=lambda mention: mention.end)
        return [Mention(last.entries, pointer.start(), pointer.end(), PARTLY)]


def _subject(entry: BankEntry, end: str) -> str | None:
    """The edit's subject as its prompt mentions it. One that the prompt does not mention is wrong, or worded otherwise:
    then the most likely one is taken from the prompt."""
    if entry.subject is not None and SubjectIndex([entry.subject]).mentions(end):
        return entry.subject
    return likely_subject(end)


def _clause(text: str, mention: Mention, mentions: Sequence[Mention]) -> tuple[str, Mention]:
    """The part of a question that asks about this mention, where another part asks about another one."""
    others = [
        other for other in mentions if other.value == WHOLE and (other.start, other.end) != (mention.start, mention.end)
    ]
    first, last = 0, len(text)
    for joint in JOINT.finditer(text):
        if joint.end() <= mention.start and any(other.end <= joint.start() for other in others):
            first = joint.end()
        if joint.start() >= mention.end and any(other.start >= joint.end() for other in others):
            last = joint.start()
            break
    return text[first:last], replace(mention, start=mention.start - first, end=mention.end - first)


def _masked(text: str, mention: Mention) -> str:
    return f"{text[: mention.start]}{MASK}{text[mention.end :]}"
