"""What this process records, as Prometheus would read it."""

import time

import pytest

from pipeline.metrics import record
from tests.ray.scrape import scraped

LABELS = {"memory": "7", "shard": "of no round"}
DROPPED_SECONDS = 30  # Ray's agent drops a gauge that was not set within two of its intervals of ten seconds


@pytest.mark.usefixtures("local_ray")
def test_a_gauge_that_was_set_once_stands_as_long_as_its_process() -> None:
    record("wiseline_shard_loss", 1.25, **LABELS)
    deadline = time.monotonic() + 60
    while not shown():
        assert time.monotonic() < deadline
        time.sleep(1)
    time.sleep(DROPPED_SECONDS)
    assert shown() == [1.25]


def shown() -> list[float]:
    return [
        value
        for (name, labels), value in scraped().items()
        if name == "ray_wiseline_shard_loss" and set(LABELS.items()) <= labels
    ]
