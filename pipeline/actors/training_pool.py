"""Extract and train the shards of several memories at the same time."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from pipeline.actors.model_worker import start_model_worker
from pipeline.actors.results import fetch
from pipeline.actors.shard_trainer import start_shard_trainer
from pipeline.config import Config, ResourcesSection
from pipeline.training.fit import Progress
from pipeline.training.planning import MemoryPlan, ShardPlan

Job = tuple[MemoryPlan, ShardPlan]


@dataclass(frozen=True)
class ShardStep:
    """One shard's news: `progress` after a pass over its edits, None when its delta is in the store."""

    shard: ShardPlan
    progress: Progress | None


def extract_shards(jobs: Sequence[Job], *, config: Config) -> list[Any]:
    """References to the activations of the jobs, in their order; their keys and states are in the store.

    Trainers read their siblings' keys from the store, so this comes before any of them starts; and the worker that
    holds the whole model is gone again by then, with its GPU.
    """
    if not jobs:
        return []
    worker = start_model_worker(config, gpus=gpus_per_trainer(config.resources))
    # Two results per call: the activations stay in the object store, the driver waits for the small one.
    extracted = [worker.extract.options(num_returns=2).remote(shard) for _, shard in jobs]
    try:
        for _, wordings in extracted:
            fetch(wordings)
    finally:
        ray.kill(worker)
    return [activations for activations, _ in extracted]


def train_shards(
    jobs: Sequence[Job], activations: Sequence[Any], *, config: Config, fingerprint: str, layer: int
) -> Iterator[ShardStep]:
    """Train the shards and say how each is getting on.

    One ShardTrainer per shard in flight, as many as the cluster has room for. Raises what a shard raised; finished
    shards stay finished.
    """
    gpus = gpus_per_trainer(config.resources)
    waiting = deque(zip(jobs, activations, strict=True))
    trainers = [
        start_shard_trainer(config, gpus=gpus, fingerprint=fingerprint, layer=layer)
        for _ in range(min(trainers_at_once(config.resources, gpus=gpus), len(jobs)))
    ]
    # A trainer gets its first shard when it is up: where the cluster has less room than it says, the others do it all.
    starting = {trainer.ready.remote(): trainer for trainer in trainers}
    running: dict[Any, tuple[Any, ShardPlan]] = {}

    def give(trainer: Any) -> None:
        if waiting:
            (memory, shard), of_shard = waiting.popleft()
            running[trainer.train.options(num_returns="streaming").remote(memory, shard, of_shard)] = (trainer, shard)

    try:
        while waiting or running:
            ready, _ = ray.wait([*running, *starting], num_returns=1)
            for news in ready:
                if news in starting:
                    fetch(news)
                    give(starting.pop(news))
                    continue
                trainer, shard = running[news]
                try:
                    progress = fetch(next(news))
                except StopIteration:
                    del running[news]
                    give(trainer)
                    progress = None
                yield ShardStep(shard, progress)
    finally:
        for trainer in trainers:
            ray.kill(trainer)


def gpus_per_trainer(resources: ResourcesSection) -> float:
    """The configured share; by default a whole GPU where the cluster has any, else the CPU."""
    if resources.gpus_per_trainer == "auto":
        return 1.0 if ray.cluster_resources().get("GPU", 0) > 0 else 0.0
    return resources.gpus_per_trainer


def trainers_at_once(resources: ResourcesSection, *, gpus: float) -> int:
    """How many trainers the cluster can hold, at least one."""
    cluster = ray.cluster_resources()
    limits = []
    if gpus:
        limits.append(cluster.get("GPU", 0) / gpus)
    if resources.cpus_per_trainer:
        limits.append(cluster.get("CPU", 0) / resources.cpus_per_trainer)
    return max(1, int(min(limits, default=1)))
