"""Retention by age: every edit in one bin, the oldest first."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.measure import Failure, Measurement
from pipeline.evaluation.study import retention

NOTHING = Measurement(
    edits=0,
    reliability=None,
    reliability_chat=None,
    generalization=None,
    locality=None,
    locality_by_kind={},
    routed={},
    reached={},
    asked={},
    asked_edits=(),
    failures=(),
)


def failed(edit_id: str, kind: str = "reliability") -> Failure:
    return Failure(kind=kind, edit_id=edit_id, prompt="", expected="", answer="", routed=False)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_the_bins_hold_every_edit_once(held: list[bool]) -> None:
    ids = [str(index) for index in range(len(held))]
    failures = tuple(failed(edit_id) for edit_id, holds in zip(ids, held, strict=True) if not holds)
    ages = retention(ids, replace(NOTHING, failures=failures, asked_edits=tuple(ids)))
    assert len(ages) == min(5, len(ids))
    sizes = [round((i + 1) * len(ids) / len(ages)) - round(i * len(ids) / len(ages)) for i in range(len(ages))]
    assert round(sum(share * size for share, size in zip(ages, sizes, strict=True))) == sum(held)


def test_the_oldest_come_first_and_only_the_edited_prompt_counts() -> None:
    ids = [str(index) for index in range(10)]
    failures = (failed("0"), failed("1"), failed("9", kind="generalization"))
    measured = replace(NOTHING, failures=failures, asked_edits=tuple(ids))
    assert retention(ids, measured) == (0.0, 1.0, 1.0, 1.0, 1.0)
    assert retention(["never asked", "0"], measured) == (0.0,)
