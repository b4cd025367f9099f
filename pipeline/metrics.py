"""Every metric of wiseline in one table, and the one call that records them.

Ray exports what is recorded: each node's agent serves it for all processes of that node, under the names below with
`ray_` before them (docs/operations.md#metrics). A process without Ray records nothing, and nothing fails.
"""

import functools
import sys
import threading
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["counter", "gauge", "histogram"]
Reporter = Literal["round", "ingest", "replica", "live trainer"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# Ray wants boundaries above 0, so a margin is a share: 0.5 is the threshold itself.
MARGINS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
NOTHING = 1e-300  # Ray refuses to count 0
AGAIN_SECONDS = 10.0  # Ray's agent drops a gauge that was not set within two of its intervals of ten seconds


@dataclass(frozen=True)
class Metric:
    """`reporter`: which process records it. Every replica reports what stands in the store: take the maximum."""

    kind: Kind
    unit: str
    reporter: Reporter
    meaning: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


METRICS: dict[str, Metric] = {
    # What stands in the store.
    "wiseline_edits_living": Metric("gauge", "edits", "replica", "edits that the log says now"),
    "wiseline_edits_waiting": Metric(
        "gauge", "edits", "replica", "edits and retractions in the log that the release in use does not follow yet"
    ),
    "wiseline_edits_waiting_seconds": Metric(
        "gauge", "seconds", "replica", "how long the oldest of them waits; 0: none"
    ),
    "wiseline_edits_failed": Metric("gauge", "edits", "replica", "posted edits that did not come to hold live"),
    "wiseline_log_entries": Metric("gauge", "entries", "replica", "entries ever written to the log; it only grows"),
    "wiseline_quarantined_rows": Metric("gauge", "rows", "replica", "rows in quarantine; it only grows"),
    "wiseline_head_release": Metric("gauge", "number", "replica", "the newest release for the base model it serves"),
    "wiseline_release_age_seconds": Metric("gauge", "seconds", "replica", "since that release was published"),
    "wiseline_round_running": Metric("gauge", "0 or 1", "replica", "whether a round has begun and not ended"),
    "wiseline_round_silent_seconds": Metric(
        "gauge", "seconds", "replica", "since the running round last wrote anything; 0: none runs"
    ),
    "wiseline_round_shards": Metric("gauge", "shards", "replica", "shards of the running round", ("state",)),
    "wiseline_last_round_missed": Metric(
        "gauge", "0 or 1", "replica", "whether the round that ended last missed a threshold"
    ),
    "wiseline_last_round_age_seconds": Metric("gauge", "seconds", "replica", "since the last round ended"),
    "wiseline_last_round_phase_seconds": Metric(
        "gauge", "seconds", "replica", "how long each phase of the round that ended last took", ("phase",)
    ),
    "wiseline_store_errors_total": Metric("counter", "looks", "replica", "looks at the store that failed"),
    "wiseline_store_silent_seconds": Metric(
        "gauge", "seconds", "replica", "since it last read all that it tells of the store"
    ),
    # What a replica does.
    "wiseline_release": Metric("gauge", "number", "replica", "the release that this replica answers with; 0: none"),
    "wiseline_answers_total": Metric(
        "counter",
        "answers",
        "replica",
        "answers that began, by route: main, memory, or off where it was asked for",
        ("route",),
    ),
    "wiseline_routing_margin": Metric(
        "histogram",
        "share",
        "replica",
        "how near the nearest edit came: the logistic of score minus threshold; above 0.5 a side memory answers",
        boundaries=MARGINS,
    ),
    "wiseline_first_token_seconds": Metric(
        "histogram",
        "seconds",
        "replica",
        "from a request's entry into the queue to its first token",
        boundaries=SECONDS,
    ),
    "wiseline_tokens_total": Metric("counter", "tokens", "replica", "tokens that were generated"),
    "wiseline_prompt_tokens_total": Metric("counter", "tokens", "replica", "tokens of prompts that were let in"),
    "wiseline_queued_prompts": Metric("gauge", "prompts", "replica", "prompts that wait for a place in the batch"),
    "wiseline_running_answers": Metric("gauge", "answers", "replica", "answers that are being written"),
    "wiseline_refused_requests_total": Metric(
        "counter", "requests", "replica", "requests refused by a full queue (429)"
    ),
    "wiseline_failed_steps_total": Metric("counter", "steps", "replica", "steps in which the model raised"),
    "wiseline_swap_seconds": Metric(
        "histogram", "seconds", "replica", "to load, verify and swap in a release", boundaries=SECONDS
    ),
    "wiseline_live_release_seconds": Metric(
        "histogram", "seconds", "live trainer", "to make and publish one live release", boundaries=SECONDS
    ),
    # What a round does.
    "wiseline_round_phase_seconds": Metric(
        "gauge", "seconds", "round", "how long each phase of this round took so far", ("phase",)
    ),
    "wiseline_shard_loss": Metric(
        "gauge",
        "nats per target",
        "round",
        "loss of the shard that was trained last at this place",
        ("memory", "shard"),
    ),
    "wiseline_training_steps_total": Metric("counter", "steps", "round", "optimiser steps of shards"),
    "wiseline_merge_bytes_total": Metric("counter", "bytes", "round", "bytes of shard deltas that were merged"),
    "wiseline_merge_seconds_total": Metric("counter", "seconds", "round", "spent in merging them"),
    "wiseline_rows_total": Metric(
        "counter",
        "rows",
        "ingest",
        "rows of files and posts by outcome, as `wiseline ingest` names it; posted ones are refused at once",
        ("outcome",),
    ),
}


_gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}  # the last values, by name and labels


def record(name: str, value: float = 1.0, **labels: str) -> None:
    """Count `value` up, set the gauge to it, or observe it, as the table says. Counting 0 makes a counter visible, so
    that its first event is seen as a rise. Costs some ten microseconds: for steps and requests, not for tokens."""
    metric = METRICS[name]
    assert set(labels) == set(metric.labels), f"{name} has the labels {metric.labels}"
    if not recorded():
        return
    exported = _exported(name)
    if metric.kind == "gauge":
        _gauges[name, tuple(labels.items())] = value
        _keep_gauges()
        exported.set(value, tags=labels)
    elif metric.kind == "histogram":
        exported.observe(value, tags=labels)
    else:
        exported.inc(value or NOTHING, tags=labels)


def recorded() -> bool:
    """Whether this process is part of a Ray that exports what it records."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


@functools.cache
def _keep_gauges() -> None:
    """A gauge stands until it is set anew or its process ends, however seldom it is recorded."""

    def set_again() -> None:
        pause = threading.Event()
        while not pause.wait(AGAIN_SECONDS):
            for name, labels in list(_gauges) if recorded() else ():
                _exported(name).set(_gauges[name, labels], tags=dict(labels))

    threading.Thread(target=set_again, name="wiseline-gauges", daemon=True).start()


@functools.cache
def _exported(name: str) -> Any:
    from ray.util.metrics import Counter, Gauge, Histogram

    metric = METRICS[name]
    description = f"{metric.meaning} [{metric.unit}]"
    if metric.kind == "histogram":
        return Histogram(name, description, boundaries=list(metric.boundaries), tag_keys=metric.labels)
    return (Counter if metric.kind == "counter" else Gauge)(name, description, tag_keys=metric.labels)
