"""The edit log as the endpoint uses it: many small writes, and searches that must not read the log every time.

For one thread at a time, but for `leave`. Rows are refused by the same rules as rows of a file; who posted them is told
at once, so they do not go to quarantine.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import EditsSection
from pipeline.edits import Edit, normalise, parse_edit
from pipeline.errors import BadEdit, NotFound
from pipeline.metrics import record
from pipeline.serving.writable import WritableStore
from pipeline.storage.batches import Batch, Counts
from pipeline.storage.edit_log import POSTED, EditLog, LogEntry
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.slots import Slots

FIELDS = frozenset(Edit.model_fields)


@dataclass(frozen=True)
class Posted:
    """What became of each row of a post, by its place."""

    accepted: tuple[tuple[int, Edit], ...]
    refused: tuple[tuple[int, str], ...]
    counts: Counts


@dataclass
class Post:
    """Rows on their way into the log; when they are written, or cannot be, one of the last two is there."""

    rows: Sequence[object]
    author: str | None
    posted: Posted | None = None
    error: Exception | None = None

    @property
    def is_done(self) -> bool:
        return self.posted is not None or self.error is not None

    def result(self) -> Posted:
        if self.error is not None:
            raise self.error
        assert self.posted is not None
        return self.posted


class EditDesk:
    def __init__(self, store: ObjectStore, writable: WritableStore, section: EditsSection) -> None:
        self._slots, self._writable, self._section = Slots(EditLog(store)), writable, section
        self._write: EditLog | None = None
        self._waiting: list[Post] = []
        self._living: list[LogEntry] = []

    def leave(self, rows: Sequence[object], *, author: str | None) -> Post:
        """Leave rows to be written with the next turn, whoever has it. May be called from any thread."""
        post = Post(rows, author)
        self._waiting.append(post)
        return post

    def write(self) -> None:
        """Append what is waiting in one commit; each post is a batch of its own. Posting speaks every time: what a slot
        no longer says is said again. After OutcomeUnknown a post is safe to repeat."""
        posts = list(self._waiting)
        del self._waiting[: len(posts)]
        sorted_out = [self._sorted_out(post) for post in posts]
        # `after` makes each post a batch of its own: the same rows posted again are not a batch the log has heard.
        batches = [
            Batch(source=POSTED, edits=accepted, after=uuid.uuid4().hex) for accepted, _ in sorted_out if accepted
        ]
        try:
            counts = iter(self._log().append_together(batches) if batches else ())
        except Exception as error:
            for post in posts:
                post.error = error
            return
        for post, (accepted, refused) in zip(posts, sorted_out, strict=True):
            count = next(counts) if accepted else Counts()
            post.posted = Posted(accepted, refused, count)
            for outcome, rows in (
                ("ingested", count.ingested),
                ("unchanged", count.unchanged),
                ("refused", len(refused)),
            ):
                record("wiseline_rows_total", rows, outcome=outcome)

    def retract(self, edit_id: str, *, author: str | None) -> LogEntry:
        """Empty the slot that this edit fills; never of one that came after it. Raises NotFound where it fills none,
        StoreError otherwise."""
        filled = [entry for entry in self.living() if entry.edit.edit_id == edit_id]
        slots = [entry.edit.slot_id for entry in filled]
        taken = self._log().retract(slots, author=author, edit_id=edit_id) if filled else []
        if not taken:
            raise NotFound(f"No living edit has the id {edit_id}; GET /v1/edits lists them.")
        return taken[0]

    def living(self) -> list[LogEntry]:
        """Every living edit, the newest first. What is new in the log is read, and only where it has moved."""
        if self._slots.catch_up():
            self._living = [entry for entry in self._slots.newest.values() if entry.edit.op == "upsert"][::-1]
        return self._living

    def _log(self) -> EditLog:
        self._write = self._write or EditLog(self._writable.get())
        return self._write

    def _sorted_out(self, post: Post) -> tuple[tuple[tuple[int, Edit], ...], tuple[tuple[int, str], ...]]:
        """Rows that can be accepted, and reasons against the others."""
        accepted: list[tuple[int, Edit]] = []
        refused: list[tuple[int, str]] = []
        for row, fields in enumerate(post.rows):
            try:
                accepted.append((row, self._edit(fields, post.author)))
            except BadEdit as error:
                refused.append((row, str(error)))
        return tuple(accepted), tuple(refused)

    def _edit(self, fields: object, author: str | None) -> Edit:
        if isinstance(fields, Mapping):
            if unknown := sorted(str(name) for name in fields if name not in FIELDS):
                raise BadEdit(f"unknown field {unknown[0]!r}; an edit has {', '.join(Edit.model_fields)}")
            fields = {**fields, "author": author} if author else dict(fields)
        limits = self._section
        return parse_edit(fields, max_prompt_chars=limits.max_prompt_chars, max_target_chars=limits.max_target_chars)


def matches(edit: Edit, query: str) -> bool:
    """Whether every word of the query is in the edit's subject, prompt or target."""
    text = normalise(" ".join([edit.subject or "", edit.prompt, edit.target]))
    return all(word in text for word in normalise(query).split())


def as_json(entry: LogEntry) -> dict[str, Any]:
    edit = entry.edit
    said = edit.model_dump(mode="json", include={"prompt", "target", "subject", "ground_truth", "author"})
    return {"id": edit.edit_id, "object": "edit", "seq": entry.seq, **said, "ingested": entry.ingested_at.isoformat()}
