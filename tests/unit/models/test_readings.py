"""What the text signals see of a prompt."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.models.encoder import Encoder
from pipeline.models.mentions import PARTLY, WHOLE
from pipeline.models.readings import TextReader
from pipeline.storage.bank import BankEntry
from pipeline.wise.routing import Reading, Router, empty_router
from tests.tiny_world import save_encoder


def bank(*edits: tuple[str, str | None]) -> list[BankEntry]:
    return [BankEntry(str(i), prompt, "x", subject, 0) for i, (prompt, subject) in enumerate(edits)]


BANK = bank(
    ("who leads oslo", "oslo"), ("where was Ann Lee born", "Ann Lee"), ("who leads rome", "rome"), ("why", None)
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder(save_encoder(tmp_path_factory.mktemp("encoder")))


def subjects(reading: Reading) -> dict[int, float]:
    return dict(zip(reading.entries_C.tolist(), reading.subject_C.tolist(), strict=True))


def test_only_what_is_asked_is_read() -> None:
    reader = TextReader(BANK, None)
    (end, before) = reader.read(["Where is that? who leads oslo", "who leads oslo?\nwhere is Paris now?"])
    assert subjects(end) == {0: WHOLE}
    assert subjects(before) == {}


def test_a_question_about_two_subjects_mentions_both() -> None:
    (reading,) = TextReader(BANK, None).read(["who leads oslo and who leads rome"])
    assert subjects(reading) == {0: WHOLE, 2: WHOLE}


def test_a_pronoun_points_at_the_subject_named_last_and_only_in_part() -> None:
    reader = TextReader(BANK, None)
    asked = "Ann Lee came to see us.\nAnd where exactly was she born?"
    assert subjects(reader.read([asked])[0]) == {1: PARTLY}
    assert subjects(reader.read([asked.replace("she", "Bob")])[0]) == {}


def test_a_subject_its_prompt_does_not_mention_is_replaced_or_unknown() -> None:
    reader = TextReader(bank(("where was Ann Lee born", "Bob"), ("why", "Bob")), None)
    assert reader.known_E.tolist() == [True, False]
    assert subjects(reader.read(["who is Ann Lee now"])[0]) == {0: WHOLE}


def test_masking_the_subject_leaves_the_relation(encoder: Encoder) -> None:
    asked_EM, relation_EM = TextReader(BANK, encoder).embeddings()
    assert torch.equal(relation_EM[0], relation_EM[2])  # who leads X
    assert not torch.equal(asked_EM[0], asked_EM[2])
    (reading,) = TextReader(BANK, encoder).read(["who leads rome"])
    torch.testing.assert_close(reading.masked_RM[int(reading.masked_C[0])].half(), relation_EM[2], atol=1e-3, rtol=0)


def test_texts_that_are_known_already_are_not_encoded_for_the_bank(encoder: Encoder) -> None:
    """What a bank's router holds is found again by its texts, whatever else is in the next bank."""
    reader = TextReader(BANK, encoder)
    asked_EM, relation_EM = reader.embeddings()
    known = reader.texts_of(router_with(asked_EM, relation_EM))
    more = [*BANK[2:], *bank(("is it rome", "rome"))]
    again_EM, masked_EM = TextReader(more, encoder, embedded=known).embeddings()
    assert torch.equal(again_EM[:2], asked_EM[2:])
    assert torch.equal(masked_EM[:2], relation_EM[2:])
    fresh_EM, fresh_masked_EM = TextReader(more, encoder).embeddings()
    assert torch.equal(again_EM, fresh_EM)
    assert torch.equal(masked_EM, fresh_masked_EM)
    elsewhere = {text: torch.full_like(vector, 7) for text, vector in known.items()}
    taken_EM, _ = TextReader(BANK, encoder, embedded=elsewhere).embeddings()
    assert bool((taken_EM == 7).all())


def test_a_text_that_grew_into_two_embeddings_is_encoded_again(encoder: Encoder) -> None:
    """So many subjects have a word now that it is no mention any more: what was masked is the prompt itself."""
    before = bank(("where was oslo born in", "rome oslo"))
    asked_EM, relation_EM = TextReader(before, encoder).embeddings()
    assert not torch.equal(asked_EM, relation_EM)
    more = [*before, *bank(*((f"who leads n{number} oslo", f"n{number} oslo") for number in range(17)))]
    grown_EM, grown_masked_EM = TextReader(more, encoder).embeddings()
    kept = router_with(torch.cat([asked_EM, grown_EM[1:]]), torch.cat([relation_EM, grown_masked_EM[1:]]))
    known = TextReader(more, None).texts_of(kept)
    again_EM, again_masked_EM = TextReader(more, encoder, embedded=known).embeddings()
    assert torch.equal(again_EM, grown_EM)
    assert torch.equal(again_masked_EM, grown_masked_EM)


def router_with(asked_EM: Tensor, relation_EM: Tensor) -> Router:
    return replace(empty_router(1), asked_EM=asked_EM, relation_EM=relation_EM)


def test_a_text_is_read_to_the_bit_as_it_is_alone(encoder: Encoder) -> None:
    texts = ["who leads rome", "a", "who leads oslo and who leads rome", "b " * 60]
    together = TextReader(BANK, encoder).read(texts)
    encoder._remembered.clear()
    for text, reading in zip(reversed(texts), reversed(together), strict=True):
        (alone,) = TextReader(BANK, encoder).read([text])
        assert torch.equal(alone.asked_M, reading.asked_M)
        assert torch.equal(alone.masked_RM, reading.masked_RM)
        assert subjects(alone) == subjects(reading)


def test_without_an_encoder_only_subjects_are_read() -> None:
    reader = TextReader(BANK, None)
    assert reader.embeddings()[0].shape == (4, 0)
    assert reader.read(["who leads rome"])[0].asked_M.shape == (0,)
