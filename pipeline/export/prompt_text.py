"""From the tokens of a prompt back to the text that the router reads.

The endpoint is handed text. A model that is asked through `generate` is handed tokens, so the text is what the
tokenizer decodes. A conversation is taken apart again along the strings its chat template puts between the turns, so
that what is asked lies in the last user message, as at the endpoint. What comes from another template, or from this
one with other options, is read as one text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

from pipeline.models.prompts import render_chat
from pipeline.models.questions import TURN

QUESTION, REPLY, NEXT, SYSTEM = "Firstquestion", "Firstreply", "Nextquestion", "Systemtext"


@dataclass(frozen=True)
class ChatMarks:
    """What a chat template writes around the turns of a conversation."""

    head: str  # before the first user message
    behind_question: str
    behind_reply: str
    tail: str  # behind the last user message, up to where the assistant speaks
    head_of_system: str | None = None  # None: the template knows no system message
    behind_system: str | None = None


class PromptReader:
    """Prompt ids → text. Not bound to a release."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._marks = chat_marks(tokenizer)

    def text(self, prompt_ids: Sequence[int]) -> str:
        if self._marks is not None:
            turns = _turns(_decoded(self._tokenizer, prompt_ids), self._marks)
            if turns is not None:
                return TURN.join(turns)
        text: str = self._tokenizer.decode(
            list(prompt_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def chat_marks(tokenizer: PreTrainedTokenizerBase) -> ChatMarks | None:
    """None where there is no template, or one whose conversations cannot be told from other text."""
    if not tokenizer.chat_template:
        return None
    said = [("user", QUESTION), ("assistant", REPLY), ("user", NEXT)]
    parts = _around(tokenizer, said)
    if parts is None or not parts[2] or not parts[3]:
        return None
    head, behind_question, behind_reply, tail = parts
    of_system = _around(tokenizer, [("system", SYSTEM), ("user", QUESTION)])
    head_of_system, behind_system = of_system[:2] if of_system and of_system[1] else (None, None)
    return ChatMarks(head, behind_question, behind_reply, tail, head_of_system, behind_system)


def _around(tokenizer: PreTrainedTokenizerBase, said: Sequence[tuple[str, str]]) -> list[str] | None:
    """What the template writes before, between and behind these messages; decoded from tokens, as prompts will be."""
    messages = [{"role": role, "content": content} for role, content in said]
    try:
        rest = _decoded(tokenizer, render_chat(messages, tokenizer, add_generation_prompt=True))
    except jinja2.TemplateError:
        return None
    parts = []
    for _, content in said:
        before, found, rest = rest.partition(content)
        if not found:
            return None
        parts.append(before)
    return [*parts, rest]


def _turns(text: str, marks: ChatMarks) -> list[str] | None:
    """What was said, the last user message last; None where the text is no conversation of this template."""
    if not text.endswith(marks.tail):
        return None
    said = _without_head(text.removesuffix(marks.tail), marks)
    if said is None:
        return None
    *exchanges, last = said.split(marks.behind_reply)
    return [turn for exchange in exchanges for turn in exchange.split(marks.behind_question, maxsplit=1)] + [last]


def _without_head(text: str, marks: ChatMarks) -> str | None:
    if marks.head_of_system is not None and marks.behind_system and text.startswith(marks.head_of_system):
        _, found, said = text.partition(marks.behind_system)
        if found:
            return said
    return text.removeprefix(marks.head) if text.startswith(marks.head) else None


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
