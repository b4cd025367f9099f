"""Whether edits hold in a release: they are asked as they were edited, bare and as a chat turn, by greedy generation
through the code that serves. What a live release must pass; the round's gate also asks what training never saw."""

from collections.abc import Sequence

from pipeline.edits import Edit, normalise
from pipeline.evaluation.measure import fits_context, questions_of, request_of
from pipeline.models.base_model import BaseModel
from pipeline.models.generate import generate
from pipeline.models.loaded_release import LoadedRelease


def failing(base: BaseModel, release: LoadedRelease, edits: Sequence[Edit]) -> set[str]:
    """Ids of the edits that are not answered with their target, or not by a side memory."""
    questions = [
        question
        for edit in edits
        for question in questions_of(base, edit)
        if question.kind.startswith("reliability") and fits_context(base, question)
    ]
    if not questions:
        return set()
    answers, decisions = generate(base, release, [request_of(question) for question in questions])
    return {
        question.edit_id
        for question, answer, decision in zip(questions, answers, decisions, strict=True)
        if normalise(answer) != normalise(question.expected or "")
    }
