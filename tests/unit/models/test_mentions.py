from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models.mentions import BY_LAST_WORD, PARTLY, WHOLE, SubjectIndex, likely_subject


def values(subjects: list[str | None], text: str) -> dict[int, float]:
    """The surest mention of every entry."""
    found: dict[int, float] = {}
    for mention in SubjectIndex(subjects).mentions(text):
        for entry in mention.entries:
            found[entry] = max(mention.value, found.get(entry, mention.value))
    return found


def test_subjects_are_whole_words_without_case_accents_or_punctuation() -> None:
    subjects = ["New York", "Ann", None, "São Paulo", "C++"]
    assert values(subjects, "In new   YORK, Anna said") == {0: WHOLE}
    assert values(subjects, "ann's trip to SAO PAULO?") == {1: WHOLE, 3: WHOLE}


def test_plural_and_possessive_are_mentions() -> None:
    assert values(["Beatle", "Volvo B12M"], "the Beatles' songs") == {0: WHOLE}
    assert values(["Beatle", "Volvo B12M"], "The Volvo B12M's maker") == {1: WHOLE}


def test_edits_that_share_a_subject_are_all_mentioned() -> None:
    assert values(["Oslo", "Bergen", "Oslo"], "oslo") == {0: WHOLE, 2: WHOLE}


def test_a_subject_without_a_word_is_unknown() -> None:
    index = SubjectIndex(["??", "Oslo"])
    assert index.mentions("what ??") == []
    assert index.known == {1}


def test_a_part_is_less_than_the_whole_and_a_last_word_more_than_another_part() -> None:
    subjects = ["Danielle Darrieux"]
    assert values(subjects, "where was Darrieux born") == {0: BY_LAST_WORD}
    assert values(subjects, "where was Danielle born") == {0: PARTLY}
    assert values(subjects, "where was Paul Darrieux born") == {0: PARTLY}
    assert values(subjects, "Paul Darrieux was born in") == {0: PARTLY}
    assert values(subjects, "where was he born") == {}


def test_a_subject_inside_a_longer_name_is_only_partly_meant() -> None:
    assert values(["Tokyo"], "Where is Tokyo Shimbun based?") == {0: PARTLY}
    assert values(["Tokyo"], "Is Tokyo big?") == {0: WHOLE}
    assert values(["Delhi", "New Delhi"], "where is new delhi") == {0: PARTLY, 1: WHOLE}
    assert values(["Delhi", "New Delhi"], "new delhi or delhi") == {0: WHOLE, 1: WHOLE}
    assert values(["Tokyo"], "IS TOKYO BIG") == {0: WHOLE}


def test_a_word_that_many_subjects_share_tells_nothing() -> None:
    assert values([f"{first} Smith" for first in map(chr, range(65, 90))], "who is Smith") == {}


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab ", min_size=1, max_size=8), max_size=6), st.text(alphabet="ab ", max_size=20))
def test_agrees_with_a_plain_search(subjects: list[str], text: str) -> None:
    padded = f" {' '.join(text.split())} "
    wanted = {i for i, s in enumerate(subjects) if s.split() and f" {' '.join(s.split())} " in padded}
    mentions = SubjectIndex(list(subjects)).mentions(text)
    whole = {entry for m in mentions for entry in m.entries if text[m.start : m.end].split() == subjects[entry].split()}
    assert whole == wanted


def test_a_missing_subject_is_the_longest_name_in_the_prompt() -> None:
    assert likely_subject("What city was Tiasial Wian born in?") == "Tiasial Wian"
    assert likely_subject("Volvo B12M's manufacturer was who?") == "Volvo B12M"
    assert likely_subject("who sang it") is None
