from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.mentions import SubjectTable


def test_subjects_are_whole_words_without_case_or_punctuation() -> None:
    table = SubjectTable(["New York", "Ann", None, "São Paulo", "C++"])
    assert table.mentions(["In new   YORK, Anna said"]).tolist() == [[1, -1, 0, -1, -1]]
    assert table.mentions(["ann's trip to SÃO PAULO?"]).tolist() == [[-1, 1, 0, 1, -1]]


def test_edits_that_share_a_subject_are_all_mentioned() -> None:
    assert SubjectTable(["Oslo", "Bergen", "Oslo"]).mentions(["oslo"]).tolist() == [[1, -1, 1]]


def test_a_subject_without_a_word_counts_as_absent() -> None:
    assert SubjectTable(["??"]).mentions(["what ??"]).tolist() == [[0]]


@given(st.lists(st.text(alphabet="ab ", min_size=1, max_size=8), max_size=6), st.text(alphabet="ab ", max_size=20))
def test_agrees_with_a_plain_search(subjects: list[str], text: str) -> None:
    padded = f" {' '.join(text.split())} "
    wanted = [0 if not s.split() else 1 if f" {' '.join(s.split())} " in padded else -1 for s in subjects]
    assert SubjectTable(subjects).mentions([text]).tolist() == [wanted]
