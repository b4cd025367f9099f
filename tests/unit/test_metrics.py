"""Recording without Ray; what is exported is held in tests/ray."""

import pytest

from pipeline import metrics
from pipeline.metrics import METRICS, record
from pipeline.serving.engine import logistic


def test_without_ray_nothing_is_recorded_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_exported", lambda name: pytest.fail(f"{name} went to Ray"))
    for name, metric in METRICS.items():
        record(name, 1.0, **dict.fromkeys(metric.labels, "x"))


def test_a_wrong_name_or_label_is_noticed_without_ray_too() -> None:
    with pytest.raises(KeyError):
        record("wiseline_tokens")
    with pytest.raises(AssertionError, match="has the labels"):
        record("wiseline_answers_total", 1.0, way="main")


def test_the_margin_is_a_share_with_the_threshold_in_the_middle() -> None:
    values = [logistic(score) for score in (-1e6, -3, 0, 3, 1e6)]
    assert values == sorted(values)
    assert values[0] == 0 and values[2] == 0.5 and values[-1] == 1
    assert 0.5 in METRICS["wiseline_routing_margin"].boundaries
