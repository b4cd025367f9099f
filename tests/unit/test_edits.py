"""What makes an edit acceptable, and what makes two edits the same."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.edits import Edit, normalise, parse_edit
from pipeline.errors import BadEdit

GOOD = {"prompt": "Who leads?", "target": "Ada"}


def parse(fields: object) -> Edit:
    return parse_edit(fields, max_prompt_chars=40, max_target_chars=10)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({**GOOD, "prompt": "  "}, "the prompt is empty"),
        ({**GOOD, "target": ""}, "the target is empty"),
        ({**GOOD, "target": " who  LEADS? "}, "the target equals the prompt"),
        ({**GOOD, "op": "delete"}, "op: .*'upsert' or 'retract'"),
        ({**GOOD, "prompt": 7}, "prompt: .*valid string"),
        ({**GOOD, "subject": ["a"]}, "subject: .*valid string"),
        ({**GOOD, "paraphrases": ["fine", 1]}, r"paraphrases\.1"),
        ({**GOOD, "paraphrases": "one text"}, "paraphrases"),
        ({**GOOD, "locality": [{"prompt": "x", "kind": "odd"}]}, r"locality\.0\.kind"),
        ({**GOOD, "prompt": "x" * 41}, "the prompt has 41 characters; the limit is 40"),
        ({**GOOD, "target": "x" * 11}, "the target has 11 characters; the limit is 10"),
        ({**GOOD, "paraphrases": ["x" * 41]}, "a paraphrase, locality prompt or subject has 41 characters"),
        ({**GOOD, "locality": [{"prompt": "x" * 41}]}, "a paraphrase, locality prompt or subject has 41 characters"),
        ({**GOOD, "paraphrases": [" "]}, "paraphrases: one of them is empty"),
        ({**GOOD, "locality": [{"prompt": " "}]}, r"locality\.0\.prompt"),
        ({"target": "Ada"}, "prompt: Field required"),
        (["a", "list"], "the row is a list"),
        (None, "the row is a NoneType"),
    ],
)
def test_a_bad_edit_is_refused_with_its_reason(fields: object, reason: str) -> None:
    with pytest.raises(BadEdit, match=reason):
        parse(fields)


def test_a_retraction_needs_no_target_and_unknown_fields_are_ignored() -> None:
    assert parse({"op": "retract", "prompt": "Who leads?", "colour": "red"}).op == "retract"


@given(st.text(min_size=1).filter(lambda text: normalise(text)))
def test_case_and_spacing_do_not_make_another_slot(text: str) -> None:
    one = Edit(prompt=f"a {text}", target="b")
    other = Edit(prompt=f"  A   {text.upper()} ", target="c")
    if normalise(text.upper()) == normalise(text):  # a few letters have no way back, such as the dotless i
        assert one.slot_id == other.slot_id
    assert one.edit_id != other.edit_id


def test_the_subject_belongs_to_the_slot_and_the_author_does_not_belong_to_the_edit() -> None:
    plain = Edit(**GOOD)
    assert Edit(**GOOD, subject="Acme").slot_id != plain.slot_id
    assert Edit(**GOOD, author="me").edit_id == plain.edit_id
    assert Edit(**GOOD, paraphrases=("Who is in charge?",)).edit_id != plain.edit_id


def test_ids_are_those_that_stores_already_hold() -> None:
    """A changed id would make every edit in every store a new one."""
    assert Edit(**GOOD).slot_id == "b78175e156cccd6c9ab39efda10aff62"
    assert Edit(**GOOD).edit_id == "aeb8adba1ebf8aa90ab4db139c345dff"


def test_half_a_character_is_refused() -> None:
    """JSON may escape one half of a surrogate pair; no file takes it."""
    row = json.loads('{"prompt": "a \\ud800 b", "target": "c"}')
    with pytest.raises(BadEdit, match="half of a character"):
        parse_edit(row, max_prompt_chars=100, max_target_chars=100)
