"""The gate: a round that misses a threshold publishes nothing and says why.

A round is a function of the log, the config and the model, so the same one would miss again: its verdict is kept, and a
nightly round in which nothing changed ends with the same sentence without judging anything.
"""

import contextlib
import json

from pipeline.config import RoundSection
from pipeline.errors import AlreadyExists, GateFailed, StoreError
from pipeline.evaluation.measure import Measurement
from pipeline.storage.object_store import ObjectStore

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


def keep_verdict(store: ObjectStore, round_id: str, failed: GateFailed) -> None:
    """Of two rounds at once the first one's stands: they say the same. A store that fails costs a judgement alone."""
    verdict = {"message": str(failed), "failures": failed.failures}
    with contextlib.suppress(AlreadyExists, StoreError):
        store.create(_verdict_path(round_id), json.dumps(verdict, ensure_ascii=False, indent=1).encode())


def check_verdict(store: ObjectStore, round_id: str) -> None:
    """Raises GateFailed with what an earlier attempt at this very round missed."""
    path = _verdict_path(round_id)
    if not store.exists(path):
        return
    verdict = json.loads(store.read(path))
    raise GateFailed(
        f"{verdict['message']} Neither log nor config nor model changed since; to judge it again, remove {path} "
        f"in {store.uri}.",
        tuple(verdict["failures"]),
    )


def _verdict_path(round_id: str) -> str:
    return f"rounds/{round_id}/missed.json"
