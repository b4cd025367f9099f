"""Questions to calibrate a router on: such as must not reach an edit, and paraphrases that the release shows by itself.

    sibling      another edit's prompt, unless both ask the same thing
    same_answer  of these the ones whose old answer another edit's is too: a late layer may hardly tell them apart
    swapped      another edit's question asked about this edit's subject (same subject, other relation)
    before       an edit's prompt, then text of the base model: what was asked is over
    unrelated    text the base model writes by itself, also with an edit's subject at its end

A swapped question that the unedited model answers, surely, just as it answers the edit's own prompt is a paraphrase
of the edit (or as good as one): where edits come in several wordings, their release has paraphrases that nobody wrote
down.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.edits import normalise
from pipeline.models.mentions import WHOLE
from pipeline.models.questions import asked
from pipeline.models.readings import TextReader
from pipeline.storage.bank import BankEntry
from pipeline.training.prompt_reader import PromptReader
from pipeline.wise.routing import Router, whitened

SWAPS_PER_SUBJECT = 4
SURE_QUANTILE = 0.25
SAME_QUESTION = 0.98  # cosine; the demo's different questions about one subject stay below 0.9
MOST_QUERIES = 2000  # per kind; a 0.5 % rate is then still an average over ten


@dataclass(frozen=True)
class Questions:
    """`hidden[b]`: entries that question b may well reach. `right`: of a paraphrase, the entry it asks. `asked`: how
    many questions these were before the harmless ones were left out."""

    states_BD: Tensor
    texts: list[str]
    hidden: list[frozenset[int]]
    asked: int
    right: tuple[int, ...] = ()


@dataclass(frozen=True)
class Found:
    negatives: dict[str, Questions]
    paraphrases: Questions | None


def find_questions(
    model: PromptReader,
    router: Router,
    reader: TextReader,
    entries: Sequence[BankEntry],
    states: Sequence[Tensor],
    *,
    unrelated: Sequence[str],
    seed: int,
) -> Found:
    """Kinds without a question are left out. The router's bank is used, not its weights."""
    rng = random.Random(seed)
    foreign = [text for text in unrelated if not reader.mentions_a_subject(text)]
    # As the router knows them: an edit without a subject has the likeliest one.
    entries = [replace(entry, subject=subject) for entry, subject in zip(entries, reader.subjects, strict=True)]
    swapped, paraphrases = _swapped(model, entries, rng)
    siblings, same_answer = _siblings(model, router, reader, entries, states, rng)
    kinds = {
        "sibling": siblings,
        "same_answer": same_answer,
        "swapped": swapped,
        "before": _before(model, entries, foreign, rng),
        "unrelated": _unrelated(model, entries, foreign, rng, alone=swapped is None),
    }
    return Found({name: kind for name, kind in kinds.items() if kind is not None}, paraphrases)


def _siblings(
    model: PromptReader,
    router: Router,
    reader: TextReader,
    entries: Sequence[BankEntry],
    states: Sequence[Tensor],
    rng: random.Random,
) -> tuple[Questions | None, Questions | None]:
    """Other edits' own prompts, and those of them whose old answer is not theirs alone. Two edits that ask the same
    thing are no negatives of each other: the same prompt, the same subject with the same new answer, one that mentions
    the other's subject and that the unedited model answers alike, or states so near that no router could tell them
    apart where the subjects do not."""
    if len(entries) < 2:
        return None, None
    chosen = sorted(rng.sample(range(len(entries)), min(len(entries), MOST_QUERIES)))
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, entry in enumerate(entries):
        for thing in _things_asked(entry):
            alike[thing].append(index)
    bare_ED = whitened(torch.stack([rows[0] for rows in states]), router.mean_D, router.whiten_DD)
    hidden = []
    for index in chosen:
        same = {other for thing in _things_asked(entries[index]) for other in alike[thing]}
        near = (bare_ED @ bare_ED[index] >= SAME_QUESTION).nonzero().flatten().tolist()
        same |= {other for other in near if not _subjects_differ(entries[index], entries[other])}
        hidden.append(frozenset(same | {index}))
    texts = [entries[index].prompt for index in chosen]
    answers = dict(zip(chosen, model.read(texts).answers_N.tolist(), strict=True))
    for row, (index, reading) in enumerate(zip(chosen, reader.read(texts), strict=True)):
        named = reading.entries_C[reading.subject_C == WHOLE].tolist()
        hidden[row] |= {other for other in named if answers.get(other) == answers[index]}
    siblings = Questions(torch.stack([states[index][0] for index in chosen]), texts, hidden, asked=len(chosen))
    sharing: dict[int, list[int]] = defaultdict(list)
    for row, index in enumerate(chosen):
        sharing[answers[index]].append(row)
    rows = sorted(row for same in sharing.values() if len(same) > 1 for row in same)
    return siblings, _chosen(siblings, rows, asked=len(chosen))


def _things_asked(entry: BankEntry) -> list[tuple[str, ...]]:
    """Edits that share one of these ask the same thing."""
    things: list[tuple[str, ...]] = [("prompt", normalise(entry.prompt))]
    if entry.subject:
        things.append(("target", normalise(entry.subject), normalise(entry.target)))
    return things


def _subjects_differ(one: BankEntry, other: BankEntry) -> bool:
    return bool(one.subject and other.subject) and normalise(one.subject or "") != normalise(other.subject or "")


def _swapped(
    model: PromptReader, entries: Sequence[BankEntry], rng: random.Random
) -> tuple[Questions | None, Questions | None]:
    """Other edits' questions about this edit's subject: as negatives, as far as they are real questions about something
    else, and as paraphrases, where they are the same question.

    One that the unedited model answers like one of the subject's own edits (by the first token) is probably a
    paraphrase of that edit. One that it answers less surely than nearly all the edited prompts is probably nonsense
    ("Name the birthplace of France"), and is neither.
    """
    of_subject: dict[str, list[int]] = defaultdict(list)
    templates = set()
    for index, entry in enumerate(entries):
        if entry.subject is not None and entry.subject in entry.prompt:
            of_subject[entry.subject].append(index)
            templates.add(entry.prompt.replace(entry.subject, "{}"))
    subjects = rng.sample(sorted(of_subject), min(len(of_subject), MOST_QUERIES // SWAPS_PER_SUBJECT))
    swaps = [
        (template.replace("{}", subject), subject)
        for subject in subjects
        for template in rng.sample(sorted(templates), min(SWAPS_PER_SUBJECT, len(templates)))
    ]
    if not swaps:
        return None, None
    read = model.read([text for text, _ in swaps])
    own = [(index, subject) for subject in subjects for index in of_subject[subject]]
    edited = model.read([entries[index].prompt for index, _ in own])
    edit_of = {
        (subject, answer): index for (index, subject), answer in zip(own, edited.answers_N.tolist(), strict=True)
    }
    sure_B = (read.confidence_N >= edited.confidence_N.quantile(SURE_QUANTILE)).tolist()
    others: list[int] = []
    right: dict[int, int] = {}
    for row, ((text, subject), answer) in enumerate(zip(swaps, read.answers_N.tolist(), strict=True)):
        asks = edit_of.get((subject, answer))
        if asks is None and sure_B[row]:
            others.append(row)
        elif asks is not None and sure_B[row] and text != entries[asks].prompt:
            right[row] = asks
    everything = Questions(read.states_ND, [text for text, _ in swaps], [frozenset()] * len(swaps), asked=len(swaps))
    return (
        _chosen(everything, others, asked=len(swaps)),
        _chosen(everything, list(right), asked=len(swaps), right=tuple(right.values())),
    )


def _before(
    model: PromptReader, entries: Sequence[BankEntry], foreign: Sequence[str], rng: random.Random
) -> Questions | None:
    """Only where the text behind the edit's prompt is long enough to be what is asked."""
    pairs = [
        (entry.prompt, rng.choice(foreign)) for entry in rng.sample(list(entries), min(len(entries), 500)) if foreign
    ]
    texts = [f"{prompt} {text}" for prompt, text in pairs if asked(f"{prompt} {text}") in text]
    return _reaching_nothing(model, texts)


def _unrelated(
    model: PromptReader, entries: Sequence[BankEntry], foreign: Sequence[str], rng: random.Random, *, alone: bool
) -> Questions | None:
    """A model writes what it knows: a text that mentions an edit's subject may well ask the edit, and is not here.

    `alone`: no other kind of negative mentions an edit's subject."""
    named = [entry.subject for entry in entries if entry.subject]
    # Behind a question, or a text cut within a sentence, the name would be asked about. That is only better than no
    # negative that mentions a subject.
    finished = [text for text in foreign if text.endswith((".", "!"))]
    closed = foreign if not finished and alone else finished
    return _reaching_nothing(model, [*foreign, *(f"{text} {rng.choice(named)}" for text in closed if named)])


def _reaching_nothing(model: PromptReader, texts: list[str]) -> Questions | None:
    if not texts:
        return None
    return Questions(model.read(texts).states_ND, texts, [frozenset()] * len(texts), asked=len(texts))


def _chosen(questions: Questions, rows: Sequence[int], *, asked: int, right: tuple[int, ...] = ()) -> Questions | None:
    if not rows:
        return None
    return Questions(
        states_BD=questions.states_BD[list(rows)],
        texts=[questions.texts[row] for row in rows],
        hidden=[questions.hidden[row] for row in rows],
        asked=asked,
        right=right,
    )
