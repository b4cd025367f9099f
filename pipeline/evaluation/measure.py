"""Measure a release by the honest protocol: greedy generation with natural stop, exact match after normalisation, on
the final model, through the code that serves.

Reliability asks the edited prompts, generalization the held-out paraphrases, and locality compares with the unedited
model on prompts the edits must leave alone, each kind apart.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.edits import Edit, normalise
from pipeline.models.base_model import BaseModel
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.prompts import chat_prompt_ids, plain_prompt_ids

EXTRA_TOKENS = 4  # room behind the expected answer, so that an answer that runs on counts as wrong
LOCALITY_TOKENS = 16  # how much of an unrelated answer is compared


@dataclass(frozen=True)
class Failure:
    """One question that was not answered as it should be."""

    kind: str  # reliability | generalization | locality.<kind>
    edit_id: str
    prompt: str
    expected: str
    answer: str
    routed: bool


@dataclass(frozen=True)
class Measurement:
    """Shares between 0 and 1, None where no edit carries such prompts; `locality_by_kind` holds each kind alone."""

    edits: int
    reliability: float | None
    reliability_chat: float | None
    generalization: float | None
    locality: float | None
    locality_by_kind: dict[str, float]
    routed: dict[str, float]  # share routed to a side memory, per kind of question
    reached: dict[str, float]  # share routed for the sake of the edit that is asked, per kind
    asked: dict[str, int]  # how many questions, per kind
    asked_edits: tuple[str, ...]  # edits that were asked as they were edited
    failures: tuple[Failure, ...]

    @property
    def scores(self) -> dict[str, float]:
        """The figures a release's manifest carries."""
        named = {
            "reliability": self.reliability,
            "reliability_chat": self.reliability_chat,
            "generalization": self.generalization,
            "locality": self.locality,
        }
        kinds = {f"locality_{kind}": value for kind, value in self.locality_by_kind.items()}
        return {name: round(value, 6) for name, value in (named | kinds).items() if value is not None}


@dataclass(frozen=True)
class Question:
    kind: str
    edit_id: str
    text: str
    prompt_ids: tuple[int, ...]
    expected: str | None  # None: whatever the unedited model says
    max_new_tokens: int


def measure(
    base: BaseModel, release: LoadedRelease, edits: Sequence[Edit], *, most_edits: int, seed: int
) -> Measurement:
    """Ask every question of (at most `most_edits` of) the edits."""
    chosen = edits if len(edits) <= most_edits else random.Random(seed).sample(list(edits), most_edits)
    questions = [question for edit in chosen for question in questions_of(base, edit) if fits_context(base, question)]
    answers, decisions = generate(base, release, [request_of(question) for question in questions])
    local = [index for index, question in enumerate(questions) if question.expected is None]
    unedited, _ = generate(base, None, [request_of(questions[index]) for index in local])
    expected = [question.expected or "" for question in questions]
    for index, answer in zip(local, unedited, strict=True):
        expected[index] = answer

    right: dict[str, list[bool]] = defaultdict(list)
    routed: dict[str, list[bool]] = defaultdict(list)
    reached: dict[str, list[bool]] = defaultdict(list)
    failures = []
    for question, answer, wanted, decision in zip(questions, answers, expected, decisions, strict=True):
        holds = normalise(answer) == normalise(wanted)
        right[question.kind].append(holds)
        routed[question.kind].append(decision.memory is not None)
        if question.expected is not None:
            # Activation routing names no edit.
            named = decision.edit_id in (None, question.edit_id)
            reached[question.kind].append(decision.memory is not None and named)
        if not holds:
            failures.append(
                Failure(
                    kind=question.kind,
                    edit_id=question.edit_id,
                    prompt=question.text,
                    expected=wanted,
                    answer=answer,
                    routed=decision.memory is not None,
                )
            )
    kinds = {kind.removeprefix("locality."): _share(held) for kind, held in right.items() if _is_locality(kind)}
    return Measurement(
        edits=len(chosen),
        reliability=_share(right["reliability"]),
        reliability_chat=_share(right["reliability_chat"]),
        generalization=_share(right["generalization"]),
        locality=_share(held for kind, all_held in right.items() if _is_locality(kind) for held in all_held),
        locality_by_kind={kind: share for kind, share in sorted(kinds.items()) if share is not None},
        routed=_shares(routed),
        reached=_shares(reached),
        asked={kind: len(values) for kind, values in sorted(routed.items())},
        asked_edits=tuple(question.edit_id for question in questions if question.kind == "reliability"),
        failures=tuple(failures),
    )


def questions_of(base: BaseModel, edit: Edit) -> Iterable[Question]:
    target_tokens = len(base.tokenizer(f" {edit.target}", add_special_tokens=False)["input_ids"])

    def question(
        kind: str, text: str, expected: str | None, ids: Callable[[], tuple[int, ...]] | None = None
    ) -> Question:
        return Question(
            kind=kind,
            edit_id=edit.edit_id,
            text=text,
            prompt_ids=ids() if ids else plain_prompt_ids(text, base.tokenizer),
            expected=expected,
            max_new_tokens=LOCALITY_TOKENS if expected is None else target_tokens + EXTRA_TOKENS,
        )

    yield question("reliability", edit.prompt, edit.target)
    if base.tokenizer.chat_template:
        messages = [{"role": "user", "content": edit.prompt}]
        yield question("reliability_chat", edit.prompt, edit.target, lambda: chat_prompt_ids(messages, base.tokenizer))
    for paraphrase in edit.paraphrases:
        yield question("generalization", paraphrase, edit.target)
    for prompt in edit.locality:
        yield question(f"locality.{prompt.kind}", prompt.prompt, None)


def fits_context(base: BaseModel, question: Question) -> bool:
    """A held-out prompt that the model's context cannot hold together with its answer is not asked."""
    return 0 < len(question.prompt_ids) <= base.max_tokens - question.max_new_tokens


def request_of(question: Question) -> GenerationRequest:
    return GenerationRequest(prompt_ids=question.prompt_ids, text=question.text, max_new_tokens=question.max_new_tokens)


def _is_locality(kind: str) -> bool:
    return kind.startswith("locality.")


def _shares(held: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    return {kind: share for kind, values in sorted(held.items()) if (share := _share(values)) is not None}


def _share(held: Iterable[bool]) -> float | None:
    values = list(held)
    return sum(values) / len(values) if values else None
