"""Field names of the editing data sets, as tables: what each is called here.

Canonical names come first and win; ZsRE (MEND's file), WISE's hallucination and temporal sets and CounterFact (flat as
in EasyEdit, nested as in ROME) are the others. Fields that no table names are ignored.
"""

from typing import Any

# Our name -> theirs, of which the first that is present is taken.
TEXTS = {
    "op": ("op",),
    "prompt": ("prompt", "src"),
    "target": ("target", "target_new", "alt"),
    "subject": ("subject",),
    "ground_truth": ("ground_truth", "answers"),
    "author": ("author",),
}
# All that are present are taken, one text or a list of texts each.
PARAPHRASES = ("paraphrases", "rephrase", "rephrase_prompt", "rephrase2", "ood_rephrase", "paraphrase_prompts")
# All that are present are taken; the kind is what a text without one gets.
LOCALITY = {
    "locality": "unrelated",
    "locality_prompt": "unrelated",
    "loc_prompt": "unrelated",
    "loc": "unrelated",
    "neighborhood_prompts": "same_relation",
}
# Texts to calibrate the router on; all that are present are taken.
OUT_OF_SCOPE = ("out_of_scope", "loc_train")
# ROME's CounterFact keeps the edit in an object of its own, with {} for the subject in the prompt.
ROME = "requested_rewrite"

# Names whose cell in a CSV file may hold a JSON list.
LIST_NAMES = frozenset({*PARAPHRASES, *LOCALITY, *OUT_OF_SCOPE, "answers"})
PROMPT_NAMES = frozenset({*TEXTS["prompt"], ROME})


def canonical_fields(row: object) -> object:
    """The row under our names. Values are only moved: whether they are acceptable, `parse_edit` says."""
    if not isinstance(row, dict):
        return row
    given = {name: value for name, value in _without_rome(row).items() if value is not None}
    fields: dict[str, Any] = {}
    for name, theirs in TEXTS.items():
        present = [given[one] for one in theirs if one in given]
        if present:
            fields[name] = present[0]
    if "ground_truth" not in given and isinstance(given.get("answers"), list):
        fields["ground_truth"] = given["answers"][0] if given["answers"] else None
    fields["paraphrases"] = [text for name in PARAPHRASES for text in _listed(given.get(name))]
    fields["out_of_scope"] = [text for name in OUT_OF_SCOPE for text in _listed(given.get(name))]
    fields["locality"] = [
        {"prompt": one, "kind": kind} if isinstance(one, str) else one
        for name, kind in LOCALITY.items()
        for one in _listed(given.get(name))
    ]
    return fields


def _listed(value: Any) -> list[Any]:
    """A list as it is, a single value as a list of one, a blank text as nothing."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    return value if isinstance(value, list) else [value]


def _without_rome(row: dict[str, Any]) -> dict[str, Any]:
    nested = row.get(ROME)
    if not isinstance(nested, dict):
        return row
    flat = dict(row)
    for ours, theirs in {"target": "target_new", "ground_truth": "target_true"}.items():
        value = nested.get(theirs)
        flat[ours] = value.get("str") if isinstance(value, dict) else value
    prompt, subject = nested.get("prompt"), nested.get("subject")
    if isinstance(prompt, str) and isinstance(subject, str):
        prompt = prompt.replace("{}", subject)
    flat["prompt"], flat["subject"] = prompt, subject
    return flat
