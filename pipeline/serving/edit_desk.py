"""The edit log as the endpoint uses it: many small writes, and searches that must not read the log every time.

For one thread at a time. Rows are refused by the same rules as rows of a file; who posted them is told at once, so they
do not go to quarantine.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import EditsSection
from pipeline.edits import Edit, normalise, parse_edit
from pipeline.errors import BadEdit, NotFound
from pipeline.serving.writable import WritableStore
from pipeline.storage.batches import Batch, Counts
from pipeline.storage.edit_log import EditLog, LogEntry
from pipeline.storage.object_store import ObjectStore

SOURCE = "POST /v1/edits"
FIELDS = frozenset(Edit.model_fields)


@dataclass(frozen=True)
class Posted:
    """What became of each row of a post, by its place."""

    accepted: tuple[tuple[int, Edit], ...]
    refused: tuple[tuple[int, str], ...]
    counts: Counts


class EditDesk:
    def __init__(self, store: ObjectStore, writable: WritableStore, section: EditsSection) -> None:
        self._read, self._writable, self._section = EditLog(store), writable, section
        self._write: EditLog | None = None
        self._version: int | None = None
        self._living: list[LogEntry] = []

    def post(self, rows: Sequence[object], *, author: str | None) -> Posted:
        """Append the rows that can be accepted, as one batch. Posting speaks every time: what a slot no longer says is
        said again. Raises StoreError; after OutcomeUnknown the same post is safe to repeat."""
        accepted: list[tuple[int, Edit]] = []
        refused: list[tuple[int, str]] = []
        for row, fields in enumerate(rows):
            try:
                accepted.append((row, self._edit(fields, author)))
            except BadEdit as error:
                refused.append((row, str(error)))
        counts = Counts()
        if accepted:
            # `after` makes each post a batch of its own: the same rows posted again are not a batch the log has heard.
            batch = Batch(source=SOURCE, edits=tuple(accepted), after=uuid.uuid4().hex)
            counts = self._log().append(batch, again=True)
        return Posted(tuple(accepted), tuple(refused), counts)

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
        """Every living edit, the newest first. The log is read only where it has moved since the last time."""
        version = self._read.version()
        if version != self._version:
            self._living = self._read.live(version)[::-1] if version is not None else []
            self._version = version
        return self._living

    def _log(self) -> EditLog:
        self._write = self._write or EditLog(self._writable.get())
        return self._write

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
