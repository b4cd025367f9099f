"""The gate: a round that misses a threshold publishes nothing and says why."""

from pipeline.config import RoundSection
from pipeline.errors import GateFailed
from pipeline.evaluation.measure import Measurement

NAMED_FAILURES = 20


def missed_thresholds(measured: Measurement, section: RoundSection) -> list[str]:
    """One sentence per threshold that is missed. A kind of prompt that no edit carries is not judged."""
    judged = [
        ("reliability", measured.reliability, section.min_reliability),
        ("generalization", measured.generalization, section.min_generalization),
        ("locality", measured.locality, section.min_locality),
    ]
    return [
        f"{name} {value:.3f} is below round.min_{name} {least:g}"
        for name, value, least in judged
        if value is not None and value < least
    ]


def check_gate(measured: Measurement, section: RoundSection) -> None:
    """Raises GateFailed naming the thresholds and the first failed edits."""
    missed = missed_thresholds(measured, section)
    if not missed:
        return
    named = [
        f"{failure.kind}: {failure.prompt!r} should give {failure.expected!r}, gave {failure.answer!r}"
        for failure in measured.failures[:NAMED_FAILURES]
    ]
    raise GateFailed(
        f"The candidate was not published: {'; '.join(missed)}. The last release stands; see the report for the edits "
        "that failed.",
        tuple(missed + named),
    )
