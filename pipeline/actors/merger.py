"""Ray actor that gathers shard deltas from Parquet and merges them into side memories."""

from typing import Any

import ray
import torch

from pipeline.config import Config
from pipeline.storage.object_store import open_store
from pipeline.storage.releases import ObjectRef
from pipeline.training.memory import merge_memory
from pipeline.training.planning import MemoryPlan


class Merger:
    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.training.threads)
        self._config = config
        self._store = open_store(config.store)

    def merge(self, memory: MemoryPlan) -> ObjectRef:
        return merge_memory(self._store, memory, config=self._config)


def start_merger(config: Config) -> Any:
    return (
        ray.remote(Merger)
        .options(
            num_cpus=0,  # trainers that wait to polish may hold every CPU there is
            max_restarts=config.resources.max_restarts,
            max_task_retries=config.resources.max_restarts,
        )
        .remote(config)
    )
