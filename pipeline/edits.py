"""An edit, the slot it fills, and what makes one acceptable.

An edit says: when asked `prompt`, the answer is now `target`. The slot is what it is about (subject + prompt, compared
without case or spacing), so a later edit of the same slot supersedes the earlier one and `op: retract` empties it.
"""

import hashlib
import json
import unicodedata
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import BadEdit

TUPLES = ("paraphrases", "locality", "out_of_scope")
LocalityKind = Literal["same_subject", "same_relation", "unrelated"]


class LocalityPrompt(BaseModel):
    """A prompt whose answer the edit must leave as it was."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    prompt: str = Field(min_length=1, pattern=r"\S")
    kind: LocalityKind = "unrelated"


class Edit(BaseModel):
    """One edit. `paraphrases` and `locality` are held out: they measure the edit and never train or calibrate it.
    `out_of_scope` are texts no edit may answer: the router is calibrated on them, and nothing is measured on them."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", ignored_types=(cached_property,))

    op: Literal["upsert", "retract"] = "upsert"
    prompt: str
    target: str = ""
    subject: str | None = None
    ground_truth: str | None = None
    paraphrases: tuple[str, ...] = ()
    locality: tuple[LocalityPrompt, ...] = ()
    out_of_scope: tuple[str, ...] = ()
    author: str | None = None

    @field_validator("prompt", "target")
    @classmethod
    def strip(cls, text: str) -> str:
        return text.strip()

    @field_validator("paraphrases", "out_of_scope")
    @classmethod
    def no_blank_text(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        if any(not text.strip() for text in texts):
            raise ValueError("one of them is empty")
        return texts

    @field_validator("subject", "ground_truth", "author")
    @classmethod
    def blank_is_absent(cls, text: str | None) -> str | None:
        return (text or "").strip() or None

    @model_validator(mode="after")
    def says_something(self) -> "Edit":
        if not self.prompt:
            raise ValueError("the prompt is empty")
        if self.op == "upsert" and not self.target:
            raise ValueError("the target is empty")
        if self.op == "upsert" and normalise(self.target) == normalise(self.prompt):
            raise ValueError("the target equals the prompt")
        return self

    @cached_property
    def slot_id(self) -> str:
        """What the edit is about; 128 bits in hex."""
        return _digest([normalise(self.subject or ""), normalise(self.prompt)])

    @cached_property
    def edit_id(self) -> str:
        """What the edit says: the same content has the same id, whoever sent it; 128 bits in hex."""
        # Without what an edit does not have, so that a field of a later version changes no id that stores hold.
        absent = set() if self.out_of_scope else {"out_of_scope"}
        return _digest(self.model_dump(mode="json", exclude={"author"} | absent))


def parse_edit(fields: object, *, max_prompt_chars: int, max_target_chars: int) -> Edit:
    """Edit from canonical field names. Raises BadEdit with the reason in words when a row cannot be accepted."""
    if not isinstance(fields, dict):
        raise BadEdit(f"the row is a {type(fields).__name__}, not an object with fields")
    for name in TUPLES:  # JSON has lists only; strict mode wants tuples
        if isinstance(fields.get(name), list):
            fields = {**fields, name: tuple(fields[name])}
    try:
        edit = Edit.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise BadEdit(f"{where}: {message}" if where else message) from None
    if not _encodable(edit):
        raise BadEdit("a text has half of a character in it (a lone surrogate); write it as UTF-8")
    if len(edit.prompt) > max_prompt_chars:
        raise BadEdit(f"the prompt has {len(edit.prompt)} characters; the limit is {max_prompt_chars}")
    locality = [prompt.prompt for prompt in edit.locality]
    if (longest := max(map(len, [*edit.paraphrases, *locality, *edit.out_of_scope, edit.subject or ""]))) > (
        max_prompt_chars
    ):
        raise BadEdit(
            f"a paraphrase, locality prompt or subject has {longest} characters; the limit is {max_prompt_chars}"
        )
    if len(edit.target) > max_target_chars:
        raise BadEdit(f"the target has {len(edit.target)} characters; the limit is {max_target_chars}")
    return edit


def normalise(text: str) -> str:
    """Text as slots and subject mentions compare it: NFKC, case folded, runs of white space as one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _digest(content: object) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True, ensure_ascii=False).encode(), digest_size=16).hexdigest()


def _encodable(edit: Edit) -> bool:
    """JSON may escape one half of a surrogate pair; no file and no tokenizer takes it."""
    locality = [prompt.prompt for prompt in edit.locality]
    texts = [edit.prompt, edit.target, edit.subject, edit.ground_truth, edit.author]
    try:
        "".join(filter(None, [*texts, *edit.paraphrases, *locality, *edit.out_of_scope])).encode()
    except UnicodeEncodeError:
        return False
    return True
