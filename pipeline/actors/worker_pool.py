"""A round's workers, and many shards and memories spread over them."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray

from pipeline.actors.results import fetch
from pipeline.actors.worker import Within, gpus_per_worker, start_worker
from pipeline.config import Config
from pipeline.logs import ids
from pipeline.models.base_model import Identity
from pipeline.storage.releases import ObjectRef
from pipeline.traces import here
from pipeline.training.fit import Progress
from pipeline.training.planning import MemoryPlan, ShardPlan

SMALL_MODEL_BYTES = 2**30  # of weights; a worker that keeps so much costs less than one that starts again

Job = tuple[MemoryPlan, ShardPlan]
Task = Callable[[Any], Any]  # what a worker shall do → its stream


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


class WorkerPool:
    """As many workers as the cluster has room for and a stage has work for.

    `resources.stages` says whether the workers of one stage go on with the next (`together`), or go with what they hold
    of the model, so that the next stage has their memory and their GPUs (`apart`).
    """

    def __init__(self, config: Config, *, model: Identity) -> None:
        self._config = config
        self._workers: list[Any] = []
        self._whole_model = True  # what they hold
        stages = config.resources.stages
        self.apart = model.weight_bytes > SMALL_MODEL_BYTES if stages == "auto" else stages == "apart"

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    @property
    def goes_on(self) -> bool:
        """The next stage has workers already."""
        return bool(self._workers) and not self.apart

    def stage(self, *, most: int, whole_model: bool) -> list[Any]:
        """Workers for the next stage, from one to `most`; the first of them has loaded. `whole_model`: the stage needs
        more of it than the suffix.

        Those that the stage has no work for are ended. One of them may hold the place in which a worker that died
        would start again, with a call that was made to it alone."""
        whole_model = whole_model or not self.apart
        if whole_model != self._whole_model:
            self._end()
            self._whole_model = whole_model
        wanted = max(1, min(most, _room(self._config, gpus=gpus_per_worker(self._config, whole_model=whole_model))))
        for surplus in self._workers[wanted:]:
            ray.kill(surplus)
        self._workers = self._workers[:wanted]
        more = range(wanted - len(self._workers))
        started = [start_worker(self._config, whole_model=whole_model) for _ in more]
        if not self._workers:
            loading = {worker.load.remote(whole_model=whole_model): worker for worker in started}
            (loaded,), _ = ray.wait(list(loading), num_returns=1)
            started.sort(key=lambda worker: worker is not loading[loaded])
        self._workers += started
        return self._workers

    def _end(self) -> None:
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []


def extract_shards(workers: Sequence[Any], shards: Sequence[ShardPlan]) -> dict[str, Any]:
    """References to the shards' activations by digest: they stay in the object store. Trainers read their siblings'
    keys from the store, so this comes before any of them starts."""
    tasks = [_stream("extract", shard) for shard in shards]
    counted: set[int] = set()
    activations = {}
    for index, news in _side_by_side(workers, tasks):
        if index in counted and news is not None:
            activations[shards[index].digest] = news
        elif news is not None:
            fetch(news)
            counted.add(index)
    return activations


def train_shards(workers: Sequence[Any], jobs: Sequence[Job], activations: Mapping[str, Any]) -> Iterator[ShardStep]:
    """Train the shards, one per worker at a time, and say how each is getting on.

    Raises what a shard raised; finished shards stay finished.
    """
    tasks = [_stream("train", memory, shard, activations[shard.digest]) for memory, shard in jobs]
    for index, news in _side_by_side(workers, tasks):
        yield ShardStep(jobs[index][1], None if news is None else fetch(news))


def merge_memories(workers: Sequence[Any], memories: Sequence[MemoryPlan]) -> list[ObjectRef]:
    merged: dict[int, ObjectRef] = {}
    for index, news in _side_by_side(workers, [_stream("merge", memory) for memory in memories]):
        if news is not None:
            merged[index] = fetch(news)
    return [merged[index] for index in range(len(memories))]


def polish_memories(
    workers: Sequence[Any],
    memories: Sequence[MemoryPlan],
    merged: Sequence[ObjectRef],
    activations: Mapping[str, Any],
) -> Iterator[MemoryStep]:
    """Polish the memories, one per worker at a time; the last news of each is where it lies."""
    tasks = [
        _stream("polish", memory, reference, *(activations[shard.digest] for shard in memory.shards))
        for memory, reference in zip(memories, merged, strict=True)
    ]
    for index, news in _side_by_side(workers, tasks):
        if news is not None:
            yield MemoryStep(memories[index], fetch(news))


def _stream(call: str, *arguments: Any) -> Task:
    within = Within(ids(), here())
    return lambda worker: getattr(worker, call).options(num_returns="streaming").remote(*arguments, within=within)


def _side_by_side(workers: Sequence[Any], tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
    """Run the tasks; yields (task, reference to what it streamed), and (task, None) at its end."""
    waiting = deque(enumerate(tasks))
    # A worker gets its first task when it is up: where the cluster has less room than it says, the others do it all.
    starting = {worker.ready.remote(): worker for worker in workers}
    running: dict[Any, tuple[Any, int]] = {}

    def give(worker: Any) -> None:
        if waiting:
            index, start = waiting.popleft()
            running[start(worker)] = (worker, index)

    while waiting or running:
        ready, _ = ray.wait([*running, *starting], num_returns=1)
        for news in ready:
            if news in starting:
                fetch(news)
                give(starting.pop(news))
                continue
            worker, index = running[news]
            try:
                yield index, next(news)
            except StopIteration:
                del running[news]
                give(worker)
                yield index, None


def _room(config: Config, *, gpus: float) -> int:
    """How many workers the cluster can hold, and keep busy: on its CPUs more than there are cores take turns."""
    cluster = ray.cluster_resources()
    cpus = config.resources.cpus_per_trainer
    limits = [cluster.get("CPU", 1) / config.training.threads]
    if gpus:
        limits.append(cluster.get("GPU", 0) / gpus)
    if cpus:
        limits.append(cluster.get("CPU", 0) / cpus)
    return int(min(limits))
