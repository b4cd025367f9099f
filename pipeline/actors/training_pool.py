"""Extract, train and polish many shards and memories at the same time."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from pipeline.actors.model_worker import start_model_worker
from pipeline.actors.results import fetch
from pipeline.actors.shard_trainer import start_shard_trainer
from pipeline.config import Config, ResourcesSection
from pipeline.models.base_model import Identity
from pipeline.storage.releases import ObjectRef
from pipeline.training.fit import Progress
from pipeline.training.planning import MemoryPlan, ShardPlan

Job = tuple[MemoryPlan, ShardPlan]


@dataclass(frozen=True)
class ShardStep:
    """One shard's news: `progress` after a pass over its edits, None when its delta is in the store."""

    shard: ShardPlan
    progress: Progress | None


@dataclass(frozen=True)
class MemoryStep:
    """One memory's news while it is polished: how its wordings hold, or at last where it lies."""

    memory: MemoryPlan
    news: Progress | ObjectRef


def extract_shards(shards: Sequence[ShardPlan], *, config: Config) -> dict[str, Any]:
    """References to the shards' activations by digest; their keys and states are in the store.

    Trainers read their siblings' keys from the store, so this comes before any of them starts; and the worker that
    holds the whole model is gone again by then, with its GPU.
    """
    if not shards:
        return {}
    worker = start_model_worker(config, gpus=gpus_per_trainer(config.resources))
    # Two results per call: the activations stay in the object store, the driver waits for the small one.
    extracted = {shard.digest: worker.extract.options(num_returns=2).remote(shard) for shard in shards}
    try:
        for _, wordings in extracted.values():
            fetch(wordings)
    finally:
        ray.kill(worker)
    return {digest: activations for digest, (activations, _) in extracted.items()}


@contextmanager
def trainers(config: Config, *, model: Identity, most: int) -> Iterator[list[Any]]:
    """As many ShardTrainers as the cluster has room for, at most `most`; gone when the block is left."""
    gpus = gpus_per_trainer(config.resources)
    started = [
        start_shard_trainer(config, gpus=gpus, fingerprint=model.fingerprint, layer=model.layer)
        for _ in range(min(most, trainers_at_once(config.resources, gpus=gpus)))
    ]
    try:
        yield started
    finally:
        for trainer in started:
            ray.kill(trainer)


def train_shards(pool: Sequence[Any], jobs: Sequence[Job], activations: Mapping[str, Any]) -> Iterator[ShardStep]:
    """Train the shards, one per trainer at a time, and say how each is getting on.

    Raises what a shard raised; finished shards stay finished.
    """

    def start(job: Job) -> Callable[[Any], Any]:
        memory, shard = job
        of_shard = activations[shard.digest]
        return lambda trainer: trainer.train.options(num_returns="streaming").remote(memory, shard, of_shard)

    for index, progress in _side_by_side(pool, [start(job) for job in jobs]):
        yield ShardStep(jobs[index][1], progress)


def polish_memories(
    pool: Sequence[Any],
    memories: Sequence[MemoryPlan],
    merged: Sequence[ObjectRef],
    activations: Mapping[str, Any],
) -> Iterator[MemoryStep]:
    """Polish the memories, one per trainer at a time; the last news of each is where it lies."""

    def start(memory: MemoryPlan, reference: ObjectRef) -> Callable[[Any], Any]:
        of_shards = [activations[shard.digest] for shard in memory.shards]
        return lambda trainer: trainer.polish.options(num_returns="streaming").remote(memory, reference, *of_shards)

    tasks = [start(memory, reference) for memory, reference in zip(memories, merged, strict=True)]
    for index, news in _side_by_side(pool, tasks):
        if news is not None:
            yield MemoryStep(memories[index], news)


def _side_by_side(pool: Sequence[Any], tasks: Sequence[Callable[[Any], Any]]) -> Iterator[tuple[int, Any]]:
    """Run the tasks, each a stream of one trainer; yields (task, what it streamed), and (task, None) at its end."""
    waiting = deque(enumerate(tasks))
    # A trainer gets its first task when it is up: where the cluster has less room than it says, the others do it all.
    starting = {trainer.ready.remote(): trainer for trainer in pool[: len(tasks)]}
    running: dict[Any, tuple[Any, int]] = {}

    def give(trainer: Any) -> None:
        if waiting:
            index, start = waiting.popleft()
            running[start(trainer)] = (trainer, index)

    while waiting or running:
        ready, _ = ray.wait([*running, *starting], num_returns=1)
        for news in ready:
            if news in starting:
                fetch(news)
                give(starting.pop(news))
                continue
            trainer, index = running[news]
            try:
                yield index, fetch(next(news))
            except StopIteration:
                del running[news]
                give(trainer)
                yield index, None


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
