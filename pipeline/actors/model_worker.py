"""Ray actor that holds the frozen base model: it extracts, calibrates and measures."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import ray
import torch

from pipeline.config import Config
from pipeline.edits import Edit
from pipeline.evaluation.measure import Measurement, measure
from pipeline.evaluation.study import Case, Study, study
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.loaded_release import load_release
from pipeline.storage.object_store import open_store
from pipeline.storage.releases import ObjectRef, Release
from pipeline.training.activations import Activations
from pipeline.training.candidate import Candidate, assemble
from pipeline.training.contexts import generate_texts
from pipeline.training.edit_stream import EditStream
from pipeline.training.planning import Plan, ShardPlan
from pipeline.training.shard import extract_shard


class ModelWorker:
    """Nothing is loaded in `__init__`: an exception there would end a restarting actor for good."""

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.training.threads)
        self._config = config
        self._store = open_store(config.store)

    @cached_property
    def _base(self) -> BaseModel:
        return load_base_model(self._config.model)

    @cached_property
    def _texts(self) -> list[str]:
        training = self._config.training
        return generate_texts(self._base, tokens=training.prefix_tokens, seed=training.seed)

    def extract(self, shard: ShardPlan) -> tuple[Activations | EditStream, int]:
        """What the shard's trainer needs, and apart from it how many wordings it holds."""
        extracted = extract_shard(self._base, self._store, shard, prefix_pool=self._texts, config=self._config)
        return extracted, len(extracted)

    def assemble(self, plan: Plan, memories: Sequence[ObjectRef], parent: int | None) -> Candidate:
        return assemble(self._base, self._store, plan, memories, texts=self._texts, config=self._config, parent=parent)

    def measure(self, release: Release, edits: Sequence[Edit]) -> Measurement:
        return measure(
            self._base,
            load_release(self._store, release, self._base),
            edits,
            most_edits=self._config.round.evaluate_edits,
            seed=self._config.training.seed,
        )

    def study(self, release: Release, cases: Sequence[Case], measured: Measurement) -> Study:
        return study(self._base, load_release(self._store, release, self._base), cases, measured)


def start_model_worker(config: Config, *, gpus: float) -> Any:
    return (
        ray.remote(ModelWorker)
        .options(
            num_cpus=config.resources.cpus_per_trainer,
            num_gpus=gpus,
            max_restarts=config.resources.max_restarts,
            max_task_retries=config.resources.max_restarts,
        )
        .remote(config)
    )
