"""What the benchmark counts: answers that another release would have given are mixed, streams without an end failed."""

from benchmarks.hot_swap import Outcome, judge

RIGHT = {1: ["north", "both"], 2: ["south", "both"]}
CONTENT_OF = {1: 1, 2: 2, 3: 1}


def outcome(release: int, text: str, *, question: int = 0, retries: int = 0, problem: str | None = None) -> Outcome:
    return Outcome(question, retries, 0.1, release=release, text=text, problem=problem)


def counted(*outcomes: Outcome) -> tuple[int, int]:
    figures = judge(outcomes, RIGHT, CONTENT_OF)
    assert figures["failed"] == figures["failed_with_retries"] + figures["failed_without_retries"]
    return figures["failed"], figures["mixed"]


def test_right_answers_are_neither() -> None:
    right = [outcome(1, "north"), outcome(2, " south"), outcome(3, "north"), outcome(3, "both", question=1)]
    assert counted(*right) == (0, 0)


def test_an_answer_of_another_release_or_of_two_is_mixed() -> None:
    mixed = [outcome(1, "south"), outcome(3, "south"), outcome(2, "sonorth"), outcome(-1, "said by two")]
    assert counted(*mixed) == (0, 4)


def test_failures_are_counted_for_both_kinds_of_clients() -> None:
    failed = [outcome(1, "no", problem="a stream without an end"), outcome(1, "", retries=2, problem="APIError")]
    assert counted(*failed, outcome(1, "north")) == (2, 0)
