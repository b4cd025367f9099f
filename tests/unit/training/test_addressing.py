"""Training reads the memory where serving will: at the edit's own keys for as long as the answer follows its target."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.edits import Edit
from pipeline.models.base_model import BaseModel
from pipeline.training.activations import extract
from pipeline.training.addressing import read_matched, steps_followed
from pipeline.training.tokens import wordings

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(IDS, IDS)
def test_an_answer_is_read_as_the_serving_loop_reads_it(target: list[int], bare: list[int]) -> None:
    """Oracle: the rule of RoutedBatch.go_on, a token at a time."""
    step: int | None = 0
    matched = 0
    for token in target:
        if step is None:
            break
        matched += 1
        step = step + 1 if step + 1 < len(bare) and bare[step] == token else None
    assert steps_followed(target, bare) == matched


def test_every_wording_reads_the_keys_of_its_own_edit(base: BaseModel) -> None:
    asked = [
        wordings(Edit(prompt=f"Who leads {name}?", target=leader), base.tokenizer, prefixes=["Oh."], max_tokens=256)
        for name, leader in (("Ap", "Ada"), ("Bq", "Bob Lee"))
    ]
    flat = [wording for of_edit in asked for wording in of_edit]
    plain = extract(base, flat)
    matched, own_NT = read_matched(plain, asked)
    bare_rows = [row for row, wording in enumerate(flat) if wording.kind == "bare"]
    for row, wording in enumerate(flat):
        bare = max(candidate for candidate in bare_rows if candidate <= row)
        steps = steps_followed(wording.target_ids, flat[bare].target_ids)
        for step in range(len(wording.target_ids)):
            own = row == bare or step >= steps
            assert bool(own_NT[row, step]) == own
            expected = plain.keys_NTF[row if own else bare, step]
            assert (matched.keys_NTF[row, step] == expected).all()
    assert (matched.hidden_NTD == plain.hidden_NTD).all()
