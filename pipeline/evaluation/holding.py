"""Whether edits hold in a release: they are asked as they were edited, bare and as a chat turn, through the code that
serves. What a live release must pass; the round's gate also asks what training never saw."""

from collections.abc import Sequence

from pipeline.edits import Edit, normalise
from pipeline.evaluation.measure import Question, fits_context, questions_of, request_of
from pipeline.models.base_model import BaseModel
from pipeline.models.generate import generate
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.prompts import answer_ids, chat_answer_ids, ended
from pipeline.models.teacher_forcing import ForcedRequest, teacher_force


def failing(base: BaseModel, release: LoadedRelease, edits: Sequence[Edit]) -> set[str]:
    """Ids of the edits that greedy generation does not answer with their target."""
    asked = [
        (edit, question)
        for edit in edits
        for question in questions_of(base, edit)
        if question.kind.startswith("reliability") and fits_context(base, question)
    ]
    # Where every token of the target and the end of sequence is the likeliest behind those before it, greedy generation
    # says just that, and one forward shows it. Only the others are answered token by token.
    requests = [_forced(base, edit, question) for edit, question in asked]
    answers = teacher_force(base, release, requests)
    unclear = [
        question
        for (_, question), request, answer in zip(asked, requests, answers, strict=True)
        if not all(answer.agrees(request.target_ids))
    ]
    if not unclear:
        return set()
    said, _ = generate(base, release, [request_of(question) for question in unclear])
    return {
        question.edit_id
        for question, answer in zip(unclear, said, strict=True)
        if normalise(answer) != normalise(question.expected or "")
    }


def _forced(base: BaseModel, edit: Edit, question: Question) -> ForcedRequest:
    if question.kind == "reliability_chat":
        target_ids = chat_answer_ids([{"role": "user", "content": edit.prompt}], edit.target, base.tokenizer)
    else:
        target_ids = answer_ids(edit.prompt, edit.target, base.tokenizer)
    target_ids = ended(target_ids, base.tokenizer)
    return ForcedRequest(prompt_ids=question.prompt_ids, target_ids=target_ids, text=question.text)
