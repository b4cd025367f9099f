"""Wordings: what the model is trained to say must be what it is asked to say when it serves."""

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.edits import Edit, normalise
from pipeline.models.base_model import BaseModel
from pipeline.models.prompts import chat_prompt_ids, plain_prompt_ids
from pipeline.training.tokens import choose_prefixes, fits, wordings

EDIT = Edit(prompt="Who leads the company?", target="Grace Hopper", paraphrases=("The boss is",))


def test_bare_then_chat_then_prefixed_each_ending_in_the_target(base: BaseModel) -> None:
    bare, chat, prefixed = wordings(EDIT, base.tokenizer, prefixes=["Paris is."], max_tokens=256)
    assert bare.prompt_ids == plain_prompt_ids(EDIT.prompt, base.tokenizer)
    assert chat.prompt_ids == chat_prompt_ids([{"role": "user", "content": EDIT.prompt}], base.tokenizer)
    assert prefixed.prompt_ids == plain_prompt_ids(f"Paris is. {EDIT.prompt}", base.tokenizer)
    assert [wording.kind for wording in (bare, chat, prefixed)] == ["bare", "chat", "prefixed"]
    for wording in (bare, chat, prefixed):
        assert base.tokenizer.decode(wording.target_ids[:-1]).strip() == EDIT.target
        assert wording.target_ids[-1] in base.end_ids


def test_paraphrases_are_never_trained_on(base: BaseModel) -> None:
    asked = wordings(EDIT, base.tokenizer, prefixes=["Paris is."], max_tokens=256)
    assert not any(EDIT.paraphrases[0] in base.tokenizer.decode(wording.prompt_ids) for wording in asked)


def test_wordings_beyond_the_context_are_left_out_but_the_bare_one(base: BaseModel) -> None:
    bare_tokens = len(plain_prompt_ids(EDIT.prompt, base.tokenizer)) + len("Grace Hopper") + 2
    asked = wordings(EDIT, base.tokenizer, prefixes=["very long " * 40], max_tokens=bare_tokens)
    assert [wording.kind for wording in asked] == ["bare"]
    assert fits(EDIT, base.tokenizer, max_tokens=bare_tokens + 4)
    assert not fits(EDIT, base.tokenizer, max_tokens=5)


@settings(deadline=None)
@given(
    prompt=st.text(min_size=1, max_size=60), target=st.text("ab ä", min_size=1, max_size=20), room=st.integers(0, 99)
)
def test_an_edit_fits_exactly_when_its_tokens_do(base: BaseModel, prompt: str, target: str, room: int) -> None:
    """Short ones are judged by their characters, which must not let one pass that is too long."""
    assume(prompt.strip() and target.strip() and normalise(prompt) != normalise(target))
    edit = Edit(prompt=prompt, target=target)
    (bare,) = wordings(edit, base.tokenizer, prefixes=[], max_tokens=0)
    assert fits(edit, base.tokenizer, max_tokens=room) == (len(bare.prompt_ids) + len(bare.target_ids) + 4 <= room)


def test_an_edits_prefixes_do_not_depend_on_its_company() -> None:
    pool = [f"text {index}" for index in range(20)]
    assert choose_prefixes(EDIT, pool, 3) == choose_prefixes(EDIT, pool[::-1], 3)
    assert len(set(choose_prefixes(EDIT, pool, 3))) == 3


def test_held_out_prompts_do_not_choose_the_prefixes() -> None:
    """A shard is found again by its prompts and targets alone, so nothing else may change what it is trained on."""
    pool = [f"text {index}" for index in range(20)]
    bare = Edit(prompt=EDIT.prompt, target=EDIT.target)
    assert bare.edit_id != EDIT.edit_id
    assert choose_prefixes(bare, pool, 3) == choose_prefixes(EDIT, pool, 3)
