"""How many GPUs a worker asks for; what it does is tested in tests/ray."""

import pytest

from pipeline.actors.worker import gpus_per_worker
from pipeline.config import load_config


@pytest.mark.parametrize(
    ("overrides", "whole", "suffix_alone"),
    [
        (("resources.gpus_per_trainer=0.25",), 0.25, 0.25),
        (("resources.gpus_per_trainer=0.25", "resources.gpus_per_model=3"), 3, 0.25),
    ],
)
def test_the_whole_model_may_take_more_gpus_than_a_trainer(
    overrides: tuple[str, ...], whole: float, suffix_alone: float
) -> None:
    config = load_config(overrides=overrides)
    assert gpus_per_worker(config, whole_model=True) == whole
    assert gpus_per_worker(config, whole_model=False) == suffix_alone
