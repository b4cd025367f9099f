from pipeline.evaluation.ordinary_text import OrdinaryText, changed_argmax
from pipeline.models.base_model import BaseModel
from pipeline.models.generate import Generation, GenerationRequest
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.prompts import plain_prompt_ids
from tests.unit.evaluation.conftest import EDITED

OTHERS = ["Wie heißt die Hauptstadt? Größe, Übung, Öl.", "東京 is where the company leads, and Ada Lovelace knows it."]


def twice_as_long(base: BaseModel, prompt: str) -> str:
    """Text whose first half, in tokens, is the prompt."""
    length = len(plain_prompt_ids(prompt, base.tokenizer))
    return prompt + "?" * length


def test_text_that_is_not_routed_keeps_every_token(small_base: BaseModel, scrambling: LoadedRelease) -> None:
    found = changed_argmax(small_base, scrambling, OTHERS)
    assert (found.texts, found.routed, found.changed) == (2, 0, 0)
    assert found.tokens == sum((len(plain_prompt_ids(text, small_base.tokenizer)) + 1) // 2 for text in OTHERS)


def test_a_routed_text_is_compared_from_its_second_half_on(small_base: BaseModel, scrambling: LoadedRelease) -> None:
    text = twice_as_long(small_base, EDITED)
    ids = plain_prompt_ids(text, small_base.tokenizer)
    assert ids[: len(ids) // 2] == plain_prompt_ids(EDITED, small_base.tokenizer)
    alone, together = (changed_argmax(small_base, scrambling, texts) for texts in ([text], [*OTHERS, text]))
    assert alone == OrdinaryText(texts=1, routed=1, tokens=len(ids) // 2, changed=by_hand(small_base, scrambling, ids))
    assert alone.changed > 0
    assert (together.routed, together.changed, together.texts) == (1, alone.changed, 3)


def by_hand(base: BaseModel, release: LoadedRelease, ids: tuple[int, ...]) -> int:
    """Places where the first token generated behind the longer and longer text differs, the router's decision forced by
    generating from the first half: its own tokens are overwritten with the text's."""
    half, changed = len(ids) // 2, 0
    runs = [_forced_run(base, one, ids, half) for one in (release, None)]
    for edited, unedited in zip(*runs, strict=True):
        changed += edited != unedited
    return changed


def _forced_run(base: BaseModel, release: LoadedRelease | None, ids: tuple[int, ...], half: int) -> list[int]:
    """Stepwise generation in which each chosen token is noted and the text's own token is read next."""
    request = GenerationRequest(prompt_ids=ids[:half], text=EDITED, max_new_tokens=len(ids) - half)
    generation = Generation(base, release, [request])
    chosen: list[int] = []

    def note(logits_V: object) -> int:
        chosen.append(int(logits_V.argmax()))  # type: ignore[attr-defined]
        return ids[half + len(chosen) - 1]

    generation._choosers = [note]
    while not generation.finished:
        generation.step()
    return chosen


def test_long_texts_are_cut_and_single_tokens_left_out(small_base: BaseModel, scrambling: LoadedRelease) -> None:
    assert changed_argmax(small_base, scrambling, ["word " * 200]).tokens == 32
    assert changed_argmax(small_base, scrambling, ["word " * 200], most_tokens=10).tokens == 5
    nothing = changed_argmax(small_base, scrambling, ["", "a"[:0]])
    assert (nothing.texts, nothing.routed_share, nothing.changed_share) == (0, None, None)
