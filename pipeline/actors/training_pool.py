"""Train the shards of several memories at the same time: extraction first, then a pool of ShardTrainers."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from pipeline.actors.model_worker import start_model_worker
from pipeline.actors.results import fetch
from pipeline.actors.shard_trainer import start_shard_trainer
from pipeline.config import Config, ResourcesSection
from pipeline.storage.object_store import ObjectStore
from pipeline.training.fit import Progress
from pipeline.training.planning import MemoryPlan, ShardPlan
from pipeline.training.shard_files import is_trained


@dataclass(frozen=True)
class ShardStep:
    """One shard's news: `progress` after a pass over its edits, None when its delta is in the store."""

    shard: ShardPlan
    progress: Progress | None


def train_memories(
    memories: Sequence[MemoryPlan], *, store: ObjectStore, config: Config, fingerprint: str, layer: int
) -> Iterator[ShardStep]:
    """Train every shard that has no delta yet and say how each is getting on.

    One ShardTrainer per shard in flight, as many as the cluster has room for. Raises what a shard raised; finished
    shards stay finished.
    """
    gpus = gpus_per_trainer(config.resources)
    # The driver's own store, not the actors': what is trained is asked once, before anything starts.
    waiting = deque((memory, shard) for memory in memories for shard in memory.shards if not is_trained(store, shard))
    if not waiting:
        return
    worker = start_model_worker(config, gpus=gpus)
    # Two results per call: the activations stay in the object store, the driver only waits for the small one.
    extracted = {shard.digest: worker.extract.options(num_returns=2).remote(shard) for _, shard in waiting}
    # Trainers read their siblings' keys from the store, so all extraction comes first; and the worker gives its GPU
    # back before the trainers ask for theirs.
    for _, wordings in extracted.values():
        fetch(wordings)
    ray.kill(worker)

    room = trainers_at_once(config.resources, gpus=gpus)
    idle = [
        start_shard_trainer(config, gpus=gpus, fingerprint=fingerprint, layer=layer)
        for _ in range(min(room, len(waiting)))
    ]
    running: dict[Any, tuple[Any, ShardPlan]] = {}
    while waiting or running:
        while waiting and idle:
            memory, shard = waiting.popleft()
            trainer = idle.pop()
            stream = trainer.train.options(num_returns="streaming").remote(
                memory, shard, extracted.pop(shard.digest)[0]
            )
            running[stream] = (trainer, shard)
        ready, _ = ray.wait(list(running), num_returns=1)
        for stream in ready:
            trainer, shard = running[stream]
            try:
                progress = fetch(next(stream))
            except StopIteration:
                del running[stream]
                idle.append(trainer)
                progress = None
            yield ShardStep(shard, progress)
    for trainer in idle:
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
