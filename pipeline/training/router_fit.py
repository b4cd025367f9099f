"""Fit and calibrate the router of one release.

Positives are each edit's own wordings, compared with its other wordings. Negatives, each kind apart:

    sibling    another edit's prompt, unless both ask the same thing
    swapped    another edit's question asked about this edit's subject (same subject, other relation)
    unrelated  text the base model writes by itself, also with an edit's subject at its end

The logistic model is fitted on the hardest entries of every negative; the threshold is the lowest that lets at most the
stated share of *each* kind pass. Paraphrases the edits carry are held out and are never used here.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.config import RouterSection
from pipeline.edits import normalise
from pipeline.models.base_model import BaseModel
from pipeline.models.mentions import SubjectTable
from pipeline.models.prompts import plain_prompt_ids
from pipeline.storage.bank import BankEntry
from pipeline.training.activations import PromptStates, read_prompts
from pipeline.wise.routing import SIGNALS, Router, empty_router, fit_logistic, threshold_at, whitened, whitening

SWAPS_PER_SUBJECT = 4
SURE_QUANTILE = 0.25
SAME_QUESTION = 0.98  # cosine; the demo's different questions about one subject stay below 0.9
HARDEST_ENTRIES = 3  # entries per negative prompt that the logistic model sees
MOST_QUERIES = 2000  # per kind; a 0.5 % rate is then still an average over ten


@dataclass(frozen=True)
class Negatives:
    """Prompts that must not reach `forbidden_BE` entries (true where a match would be a false positive)."""

    states_BD: Tensor
    texts: list[str]
    forbidden_BE: Tensor


@dataclass(frozen=True)
class Calibration:
    """What the report draws: best scores in and out of scope."""

    positive_scores: list[float]
    negative_scores: dict[str, list[float]]


def fit_router(
    base: BaseModel,
    entries: Sequence[BankEntry],
    states: Sequence[Tensor],
    *,
    unrelated: Sequence[str],
    section: RouterSection,
    seed: int,
) -> tuple[Router, Calibration]:
    """`states[e]`: W × D states of entry e's wordings, the bare one first. A single edit is calibrated on the unrelated
    texts alone; without any edit the router reaches nothing."""
    if not entries:
        return empty_router(int(base.model.config.hidden_size)), Calibration([], {})
    mean_D = _read(base, unrelated).states_ND.mean(dim=0)
    whiten_DD = whitening(torch.cat([states_WD - states_WD.mean(dim=0) for states_WD in states]))
    entry_N = torch.cat([torch.full((len(rows),), index) for index, rows in enumerate(states)])
    router = Router(
        mean_D=mean_D,
        whiten_DD=whiten_DD,
        keys_ND=whitened(torch.cat(list(states)), mean_D, whiten_DD),
        entry_N=entry_N,
        memory_E=torch.tensor([entry.memory for entry in entries]),
        weights_S=torch.zeros(len(SIGNALS)),
        bias=0.0,
        threshold=0.0,
    )
    subjects = SubjectTable([entry.subject for entry in entries])
    rng = random.Random(seed)
    kinds = {
        "sibling": _siblings(router, entries, states, rng),
        "swapped": _swapped(base, entries, rng),
        "unrelated": _unrelated(base, entries, unrelated, subjects, rng),
    }
    negatives = {name: kind for name, kind in kinds.items() if kind is not None}
    signals = {name: _allowed(router, subjects, kind) for name, kind in negatives.items()}
    positives_PS = _positives(router, subjects, entries, states)
    hardest_MS = torch.cat([_hardest(kind_BES) for kind_BES in signals.values()])
    weights_S, bias = fit_logistic(positives_PS, hardest_MS, active=[name in section.signals for name in SIGNALS])
    router = replace(router, weights_S=weights_S, bias=bias)
    best = {name: router.scores(kind_BES).amax(dim=1) for name, kind_BES in signals.items()}
    threshold = max(threshold_at(scores, false_positive_rate=section.false_positive_rate) for scores in best.values())
    calibration = Calibration(
        positive_scores=router.scores(positives_PS).tolist(),
        negative_scores={name: scores.tolist() for name, scores in best.items()},
    )
    return replace(router, threshold=threshold), calibration


def _positives(
    router: Router, subjects: SubjectTable, entries: Sequence[BankEntry], states: Sequence[Tensor]
) -> Tensor:
    """P × S: every wording but the bare one (unless it is the only one) against its edit's bare wording.

    Their texts end with the bare prompt, so the subject is mentioned where the bare prompt mentions it.
    """
    rows = []
    bare = 0
    for index, entry in enumerate(entries):
        keys_WD = router.keys_ND[bare : bare + len(states[index])]
        bare += len(keys_WD)
        subject = subjects.mentions([entry.prompt])[0, index]
        cosine = (keys_WD[1:] if len(keys_WD) > 1 else keys_WD) @ keys_WD[0]
        rows.append(torch.stack([cosine, subject.expand_as(cosine)], dim=1))
    return torch.cat(rows)


def _siblings(
    router: Router, entries: Sequence[BankEntry], states: Sequence[Tensor], rng: random.Random
) -> Negatives | None:
    """Other edits' own prompts. Two edits that ask the same thing are no negatives of each other: the same prompt, the
    same subject with the same new answer, or states so near that no router could tell them apart."""
    if len(entries) < 2:
        return None
    chosen = rng.sample(range(len(entries)), min(len(entries), MOST_QUERIES))
    bare_ED = whitened(torch.stack([rows[0] for rows in states]), router.mean_D, router.whiten_DD)
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, entry in enumerate(entries):
        for thing in _things_asked(entry):
            alike[thing].append(index)
    forbidden_BE = bare_ED[chosen] @ bare_ED.T < SAME_QUESTION
    for row, index in enumerate(chosen):
        forbidden_BE[row, [same for thing in _things_asked(entries[index]) for same in alike[thing]]] = False
    return Negatives(
        states_BD=torch.stack([states[index][0] for index in chosen]),
        texts=[entries[index].prompt for index in chosen],
        forbidden_BE=forbidden_BE,
    )


def _things_asked(entry: BankEntry) -> list[tuple[str, ...]]:
    """Edits that share one of these ask the same thing."""
    asked: list[tuple[str, ...]] = [("prompt", normalise(entry.prompt))]
    if entry.subject:
        asked.append(("target", normalise(entry.subject), normalise(entry.target)))
    return asked


def _swapped(base: BaseModel, entries: Sequence[BankEntry], rng: random.Random) -> Negatives | None:
    """Other edits' questions about this edit's subject, as far as they are real questions about something else.

    One that the unedited model answers like one of the subject's own edits (by the first token) is probably a
    paraphrase of that edit. One that it answers less surely than nearly all the edited prompts is probably nonsense
    ("Name the birthplace of France"). Both are left out.
    """
    prompts_of: dict[str, list[str]] = defaultdict(list)
    templates = set()
    for entry in entries:
        if entry.subject is not None and entry.subject in entry.prompt:
            prompts_of[entry.subject].append(entry.prompt)
            templates.add(entry.prompt.replace(entry.subject, "{}"))
    subjects = rng.sample(sorted(prompts_of), min(len(prompts_of), MOST_QUERIES // SWAPS_PER_SUBJECT))
    asked = [
        (template.replace("{}", subject), subject)
        for subject in subjects
        for template in rng.sample(sorted(templates), min(SWAPS_PER_SUBJECT, len(templates)))
    ]
    if not asked:
        return None
    swapped = _read(base, [text for text, _ in asked])
    own = [(prompt, subject) for subject in subjects for prompt in prompts_of[subject]]
    edited = _read(base, [prompt for prompt, _ in own])
    answered = {(subject, answer) for (_, subject), answer in zip(own, edited.answers_N.tolist(), strict=True)}
    sure = float(edited.confidence_N.quantile(SURE_QUANTILE))
    kept = [
        row
        for row, (_, subject) in enumerate(asked)
        if (subject, int(swapped.answers_N[row])) not in answered and swapped.confidence_N[row] >= sure
    ]
    if not kept:
        return None
    return Negatives(
        states_BD=swapped.states_ND[kept],
        texts=[asked[row][0] for row in kept],
        forbidden_BE=torch.ones(len(kept), len(entries), dtype=torch.bool),
    )


def _unrelated(
    base: BaseModel, entries: Sequence[BankEntry], unrelated: Sequence[str], subjects: SubjectTable, rng: random.Random
) -> Negatives | None:
    """A model writes what it knows: a text that mentions an edit's subject may well ask the edit, and is left out."""
    mentioned_B = (subjects.mentions(unrelated) > 0).any(dim=1).tolist()
    foreign = [text for text, mentioned in zip(unrelated, mentioned_B, strict=True) if not mentioned]
    named = [entry.subject for entry in entries if entry.subject]
    texts = [*foreign, *(f"{text} {rng.choice(named)}" for text in foreign if named)]
    if not texts:
        return None
    return Negatives(
        states_BD=_read(base, texts).states_ND,
        texts=texts,
        forbidden_BE=torch.ones(len(texts), len(entries), dtype=torch.bool),
    )


def _read(base: BaseModel, texts: Sequence[str]) -> PromptStates:
    return read_prompts(base, [plain_prompt_ids(text, base.tokenizer) for text in texts])


def _allowed(router: Router, subjects: SubjectTable, negatives: Negatives) -> Tensor:
    """Signals B × E × S with the entries a prompt may well reach pushed out of sight."""
    signals_BES = router.signals(negatives.states_BD, subjects.mentions(negatives.texts))
    signals_BES[~negatives.forbidden_BE] = -1.0
    return signals_BES


def _hardest(signals_BES: Tensor) -> Tensor:
    """The entries nearest to each prompt by the first signal, and by all signals together."""
    count = min(HARDEST_ENTRIES, signals_BES.shape[1])
    rows = torch.arange(len(signals_BES))[:, None]
    by_keys = signals_BES[:, :, 0].topk(count, dim=1).indices
    by_all = signals_BES.sum(dim=2).topk(count, dim=1).indices
    return torch.cat([signals_BES[rows, by_keys].flatten(0, 1), signals_BES[rows, by_all].flatten(0, 1)])
