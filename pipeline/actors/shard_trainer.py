"""Ray actor that trains one shard, or polishes one memory, at a time with the suffix of the model."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import ray
import torch
from transformers import PreTrainedModel

from pipeline.config import Config
from pipeline.models.base_model import model_folder
from pipeline.models.suffix import load_suffix
from pipeline.storage.object_store import open_store
from pipeline.storage.releases import ObjectRef
from pipeline.training.activations import Activations
from pipeline.training.edit_stream import EditStream
from pipeline.training.fit import Progress
from pipeline.training.memory import polish_memory
from pipeline.training.planning import MemoryPlan, ShardPlan
from pipeline.training.shard import train_shard


class ShardTrainer:
    """Holds layers L+1…N and the head, nothing else of the model. Nothing is loaded in `__init__`: an exception there
    would end a restarting actor for good."""

    def __init__(self, config: Config, *, fingerprint: str, layer: int) -> None:
        torch.set_num_threads(config.training.threads)
        self._config, self._fingerprint, self._layer = config, fingerprint, layer
        self._store = open_store(config.store)

    @cached_property
    def _suffix(self) -> PreTrainedModel:
        suffix = load_suffix(model_folder(self._config.model), self._layer, dtype=self._config.model.dtype)
        return suffix.to("cuda") if torch.cuda.is_available() else suffix

    def ready(self) -> None:
        """Answers when the actor has a place in the cluster."""

    def train(self, memory: MemoryPlan, shard: ShardPlan, extracted: Activations | EditStream) -> Iterator[Progress]:
        """Streams progress; when the stream ends, the delta is in the store."""
        yield from train_shard(
            self._suffix,
            self._store,
            memory,
            shard,
            extracted,
            config=self._config,
            fingerprint=self._fingerprint,
            layer=self._layer,
        )

    def polish(
        self, memory: MemoryPlan, merged: ObjectRef, *activations: Activations
    ) -> Iterator[Progress | ObjectRef]:
        """Streams progress; the last item says where the polished memory lies."""
        yield from polish_memory(self._suffix, self._store, memory, merged, activations, config=self._config)


def start_shard_trainer(config: Config, *, gpus: float, fingerprint: str, layer: int) -> Any:
    return (
        ray.remote(ShardTrainer)
        .options(
            num_cpus=config.resources.cpus_per_trainer,
            num_gpus=gpus,
            scheduling_strategy=config.resources.placement,
            max_restarts=config.resources.max_restarts,
            max_task_retries=config.resources.max_restarts,
        )
        .remote(config, fingerprint=fingerprint, layer=layer)
    )
