import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models.questions import asked, before_asked

FILLER = "It was a cold day and the wind was blowing over the long hills of the north. " * 20


@pytest.mark.parametrize(
    "question", ["Who leads Oslo?", "The mother tongue of Anne-Marie Idrac is", "What is the twin city of Lyon? It is"]
)
def test_a_question_is_found_behind_any_text(question: str) -> None:
    assert asked(question) == question
    assert asked(FILLER + question) == question


def test_what_stands_before_other_text_is_not_asked() -> None:
    assert "Oslo" not in asked(f"Who leads Oslo? {FILLER}")
    assert asked(f"Who leads Oslo? {FILLER} Where is Rome?") == "Where is Rome?"
    assert asked("Who leads Oslo?\nWhere is Rome?") == "Where is Rome?"


def test_a_short_instruction_belongs_to_the_question_before_it() -> None:
    assert asked("Who leads Oslo? Answer in one word.") == "Who leads Oslo? Answer in one word."
    assert asked("Q: Who leads Oslo?\nA:") == "Q: Who leads Oslo? A:"


def test_initials_and_abbreviations_end_no_sentence() -> None:
    assert asked("Lyndon B. Johnson was born in") == "Lyndon B. Johnson was born in"
    assert asked("I do like it. Who lives in St. Louis now?") == "Who lives in St. Louis now?"


def test_context_is_what_stands_before() -> None:
    assert before_asked("I met Ann Lee.\nWhere was she born?") == "I met Ann Lee."


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_asks_some_of_its_own_words(text: str) -> None:
    words = text.split()
    end = asked(text).split()
    assert len(end) <= 48
    assert end == words[len(words) - len(end) :]


def test_a_long_run_of_full_stops_is_read_once() -> None:
    """Each stop used to be tried as the beginning of the run, which took minutes."""
    assert asked("." * 200_000 + "x")
