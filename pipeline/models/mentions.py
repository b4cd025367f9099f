"""Where does a text mention the subjects of the bank's edits, and how surely?

    +1    the subject stands there as a whole (case, accents, punctuation, plural and possessive s aside)
    +½    its last word alone, where few other subjects share it ("Darrieux" for Danielle Darrieux)
     0    another part of it, or any of it inside another name ("Tokyo" in Tokyo Shimbun)
    −1    it does not stand there

Subjects are looked up in a table of word sequences, so a prompt costs its words times the longest subject, however many
edits there are.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.edits import normalise

WORD = re.compile(r"\w+")
# Words that do not tell one subject from another, and capitalised words that begin sentences.
COMMON = frozenset(
    WORD.findall(
        """a an and are as at be by can did do does for from had has have he her his how in is it its le la new of on or
        s she tell the they their this that to was were what when where which who whom whose why will with"""
    )
)
WHOLE, BY_LAST_WORD, PARTLY = 1.0, 0.5, 0.0
MOST_SHARING = 16  # a word in more subjects than this does not tell them apart


@dataclass(frozen=True)
class Mention:
    """Entries whose subject stands in the text from character `start` to `end`."""

    entries: tuple[int, ...]
    start: int
    end: int
    value: float


@dataclass(frozen=True)
class _Token:
    word: str  # folded to what subjects are compared by
    start: int
    end: int


class SubjectIndex:
    """Subjects of the bank's entries, in its order; None where an edit's subject is unknown."""

    def __init__(self, subjects: Sequence[str | None]) -> None:
        entries_of: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for entry, subject in enumerate(subjects):
            if subject is not None and (words := tuple(token.word for token in _tokens(subject))):
                entries_of[words].append(entry)
        self._entries = {words: tuple(entries) for words, entries in entries_of.items()}
        self._longest = max(map(len, self._entries), default=0)
        sharing: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        for words in self._entries:
            for word in (set(words) - COMMON) if len(words) > 1 else ():
                sharing[word].append(words)
        self._sharing = {word: subjects for word, subjects in sharing.items() if len(subjects) <= MOST_SHARING}
        self.known = frozenset(entry for entries in self._entries.values() for entry in entries)

    def mentions(self, text: str) -> list[Mention]:
        """Every place where a subject stands as a whole; of subjects that do not, the part that does."""
        tokens = _tokens(text)
        words = tuple(token.word for token in tokens)
        spans = [
            (first, last)
            for first in range(len(words))
            for last in range(first + 1, min(first + self._longest, len(words)) + 1)
            if words[first:last] in self._entries
        ]
        found = []
        for first, last in spans:
            inside = any(a <= first and last <= b and (a, b) != (first, last) for a, b in spans)
            value = PARTLY if inside or _inside_longer_name(text, tokens, first, last) else WHOLE
            found.append(Mention(self._entries[words[first:last]], tokens[first].start, tokens[last - 1].end, value))
        return [*found, *self._parts(text, tokens, {words[first:last] for first, last in spans})]

    def _parts(self, text: str, tokens: Sequence[_Token], whole: set[tuple[str, ...]]) -> Iterator[Mention]:
        """Subjects of which at least half of the telling words stand in the text."""
        place = {token.word: position for position, token in enumerate(tokens)}
        for subject in sorted({subject for word in place for subject in self._sharing.get(word, ())} - whole):
            telling = [word for word in subject if word not in COMMON]
            named = [place[word] for word in telling if word in place and word in self._sharing]
            if 2 * len(named) >= len(telling):
                first, last = min(named), max(named)
                alone = tokens[last].word == subject[-1] and not _inside_longer_name(
                    text, tokens, first, last + 1, part=True
                )
                value = BY_LAST_WORD if alone else PARTLY
                yield Mention(self._entries[subject], tokens[first].start, tokens[last].end, value)


def likely_subject(prompt: str) -> str | None:
    """The longest run of capitalised words, for an edit that does not name its subject; None when there is none."""
    runs: list[list[_Token]] = [[]]
    for token in _tokens(prompt):
        joined = runs[-1] and prompt[runs[-1][-1].end : token.start] in {" ", "-", "’", "'"}
        capital = prompt[token.start].isupper() or prompt[token.start].isdigit()
        if capital and not (token.word in COMMON and not joined):
            runs[-1].append(token) if joined else runs.append([token])
        else:
            runs.append([])
    longest = max(runs, key=len)
    return prompt[longest[0].start : longest[-1].end] if longest else None


def _inside_longer_name(text: str, tokens: Sequence[_Token], first: int, last: int, *, part: bool = False) -> bool:
    """Is a capitalised word joined to the mention by a blank or hyphen alone ("Tokyo Shimbun")? Only a text that has
    small letters too can say so. A word that begins it is capitalised anyway, but before a part of a subject it is
    probably another first name."""
    if text.upper() == text or not text[tokens[first].start].isupper():
        return False
    before = range(first - 1, first) if first > (0 if part else 1) else ()
    after = range(last, last + 1) if last < len(tokens) else ()
    for other in (*before, *after):
        left, right = (other, first) if other < first else (last - 1, other)
        joined = text[tokens[left].end : tokens[right].start] in {" ", "-"}
        if joined and text[tokens[other].start].isupper() and tokens[other].word not in COMMON:
            return True
    return False


def _tokens(text: str) -> list[_Token]:
    return [_Token(_folded(found.group()), found.start(), found.end()) for found in WORD.finditer(text)]


def _folded(word: str) -> str:
    """No case, no accents, no plural s."""
    if word.isascii():  # most words, and nothing to decompose
        plain = word.lower()
    else:
        decomposed = unicodedata.normalize("NFKD", normalise(word))
        plain = "".join(letter for letter in decomposed if not unicodedata.combining(letter)) or word
    return plain[:-1] if len(plain) > 3 and plain.endswith("s") and not plain.endswith("ss") else plain
