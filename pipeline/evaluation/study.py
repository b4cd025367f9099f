"""What `wiseline evaluate` adds to a round's own measurement: the literature's metrics, and how old edits fare."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.evaluation.measure import Measurement
from pipeline.evaluation.teacher_forced import perplexity, token_accuracy, token_agreement, token_confidence
from pipeline.models.base_model import BaseModel
from pipeline.models.loaded_release import LoadedRelease

AGES = 5  # bins of the edits by the order they came in
SURE = 0.8  # EasyEdit's OOD measure counts the tokens of a text that are likelier than this


@dataclass(frozen=True)
class Case:
    """One edit as a data set gives it. `locality`: prompts with their true answers, where it names them; `passage`: a
    text about the edit that was not written by the editor (temporal)."""

    edit_id: str
    prompt: str
    target: str
    paraphrases: tuple[str, ...] = ()
    locality: tuple[tuple[str, str], ...] = ()
    passage: str | None = None


@dataclass(frozen=True)
class Study:
    """Shares between 0 and 1; None where the data set asks no such question."""

    rel_tf: float | None
    gen_tf: float | None
    loc_tf: float | None
    perplexity: float | None  # of the targets behind their prompts, each at most 100, as in EasyEdit
    perplexity_unedited: float | None
    ood: float | None  # share of the passages' tokens the model is sure of
    ood_unedited: float | None
    retention: tuple[float, ...]  # reliability by age, oldest edits first


def study(base: BaseModel, release: LoadedRelease, cases: Sequence[Case], measured: Measurement) -> Study:
    edited = [(case.prompt, case.target) for case in cases]
    passages = [(case.prompt, _behind(case.prompt, case.passage)) for case in cases if case.passage]
    return Study(
        rel_tf=token_accuracy(base, release, edited).mean,
        gen_tf=token_accuracy(base, release, [(p, case.target) for case in cases for p in case.paraphrases]).mean,
        loc_tf=token_agreement(base, release, [pair for case in cases for pair in case.locality]).mean,
        perplexity=perplexity(base, release, edited).mean_clipped,
        perplexity_unedited=perplexity(base, None, edited).mean_clipped,
        ood=token_confidence(base, release, passages, above=SURE).mean,
        ood_unedited=token_confidence(base, None, passages, above=SURE).mean,
        retention=retention([case.edit_id for case in cases], measured),
    )


def retention(edit_ids: Sequence[str], measured: Measurement, *, bins: int = AGES) -> tuple[float, ...]:
    """Share of the edits of each age that are answered when asked as they were edited, the oldest first. Edits that
    the model's context could not hold were not asked, and have no age."""
    forgotten = {failure.edit_id for failure in measured.failures if failure.kind == "reliability"}
    asked = set(measured.asked_edits)
    edit_ids = [edit_id for edit_id in edit_ids if edit_id in asked]
    bins = min(bins, len(edit_ids))
    edges = [round(index * len(edit_ids) / bins) for index in range(bins + 1)]
    ages = [edit_ids[start:end] for start, end in pairwise(edges)]
    return tuple(sum(edit_id not in forgotten for edit_id in age) / len(age) for age in ages)


def _behind(prompt: str, passage: str) -> str:
    """What of the passage follows the prompt; all of it where it begins in another way."""
    return passage[len(prompt) :].strip() if passage.startswith(prompt) else passage
