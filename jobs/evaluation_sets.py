"""The editing data sets as cases: the edits that go through the pipeline, and what is asked beside them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.actors.field_names import canonical_fields
from pipeline.actors.row_formats import RawRow, read_rows
from pipeline.config import EditsSection
from pipeline.edits import Edit, LocalityKind, LocalityPrompt, parse_edit
from pipeline.errors import BadEdit, ConfigError, NotFound
from pipeline.evaluation.study import Case

FORMATS = ("auto", "zsre", "counterfact", "hallucination", "temporal", "jsonl")

# Where a data set gives the true answer to its locality prompts.
LOCALITY_ANSWERS = {"loc": "loc_ans", "locality_prompt": "locality_ground_truth", "loc_prompt": "loc_answer"}
# CounterFact's flat file does not say so, but its locality prompts ask the same relation of a neighbour.
LOCALITY_KIND: Mapping[str, LocalityKind] = {"counterfact": "same_relation"}


@dataclass(frozen=True)
class EvaluationSet:
    """The first n acceptable edits of a file that fill different slots. `refused` counts rows before the last of them
    that are no edits, or that edit a slot again."""

    format: str
    edits: tuple[Edit, ...]
    cases: tuple[Case, ...]
    refused: int


def read_evaluation_set(file: Path, *, format: str, n: int | None, limits: EditsSection) -> EvaluationSet:
    """Raises NotFound, CorruptObject or StoreError about the file, and ConfigError where no row of it is an edit."""
    if format not in FORMATS:
        raise ConfigError(f"--format {format!r} is unknown; it is one of {', '.join(FORMATS)}.")
    try:
        with file.open("rb") as opened:
            raw = list(read_rows(str(file), opened))
    except OSError as error:
        raise NotFound(f"{file} cannot be read ({error.strerror}); name a file of edits with --edits.") from None
    rows = [_parsed(row) for row in raw]
    known = recognise(next((row for row in rows if row), None)) if format == "auto" else format
    chosen: dict[str, tuple[Edit, Case]] = {}
    refused = 0
    for row in rows:
        if n is not None and len(chosen) == n:
            break
        try:
            edit, case = _case(row, known, limits)
        except BadEdit:
            refused += 1
            continue
        if edit.slot_id in chosen:
            refused += 1
        else:
            chosen[edit.slot_id] = (edit, case)
    if not chosen:
        raise ConfigError(f"{file} holds no edit; every row needs at least a prompt and a target.")
    edits, cases = zip(*chosen.values(), strict=True)
    return EvaluationSet(format=known, edits=edits, cases=cases, refused=refused)


def recognise(row: object) -> str:
    """A data set's format by the fields only it has."""
    names = set(row) if isinstance(row, dict) else set()
    if {"src", "alt"} <= names:
        return "zsre"
    if "ood_rephrase" in names:
        return "temporal"
    if {"case_id", "rephrase_prompt"} <= names or "requested_rewrite" in names:
        return "counterfact"
    return "hallucination" if {"locality_prompt", "locality_ground_truth"} <= names else "jsonl"


def _parsed(row: RawRow) -> object:
    """None where the row is no JSON."""
    try:
        return None if row.problem else json.loads(row.text)
    except ValueError:
        return None


def _case(row: Any, format: str, limits: EditsSection) -> tuple[Edit, Case]:
    """Raises BadEdit where the row fills no slot."""
    if not isinstance(row, dict) or row.get("op", "upsert") != "upsert":
        raise BadEdit("the row is no edit that fills a slot")
    passage = row.get("ood_rephrase") if format == "temporal" else None
    asked = {name: value for name, value in row.items() if name != "ood_rephrase"} if passage else row
    edit = parse_edit(
        canonical_fields(asked), max_prompt_chars=limits.max_prompt_chars, max_target_chars=limits.max_target_chars
    )
    kind = LOCALITY_KIND.get(format)
    if kind:
        edit = edit.model_copy(
            update={"locality": tuple(LocalityPrompt(prompt=p.prompt, kind=kind) for p in edit.locality)}
        )
    return edit, Case(
        edit_id=edit.edit_id,
        prompt=edit.prompt,
        target=edit.target,
        paraphrases=edit.paraphrases,
        locality=tuple(
            (row[prompt], row[answer].strip())
            for prompt, answer in LOCALITY_ANSWERS.items()
            if isinstance(row.get(prompt), str) and isinstance(row.get(answer), str) and row[answer].strip()
        ),
        passage=passage,
    )
