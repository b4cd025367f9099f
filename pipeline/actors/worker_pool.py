"""A round's workers, and many shards and memories spread over them."""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

import ray

from pipeline.actors.results import fetch
from pipeline.actors.worker import Within, gpus_per_worker, start_worker
from pipeline.config import Config
from pipeline.errors import WorkersLost
from pipeline.logs import ids
from pipeline.models.base_model import Identity
from pipeline.storage.releases import ObjectRef
from pipeline.traces import here
from pipeline.training.fit import Progress
from pipeline.training.planning import MemoryPlan, ShardPlan

SMALL_MODEL_BYTES = 2**30  # of weights; a worker that keeps so much costs less than one that starts again
LOOK_SECONDS = 2.0  # how often a stage looks which nodes have come and gone

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
    """As many workers as the cluster has room for and a stage has work for; more of them when nodes join meanwhile.

    `resources.stages` says whether the workers of one stage go on with the next (`together`), or go with what they hold
    of the model, so that the next stage has their memory and their GPUs (`apart`).
    """

    def __init__(self, config: Config, *, model: Identity) -> None:
        self._given = config
        self.workers: list[Any] = []
        self._whole_model = True  # what they hold
        stages = config.resources.stages
        self.apart = model.weight_bytes > SMALL_MODEL_BYTES if stages == "auto" else stages == "apart"

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.keep(0)

    @cached_property
    def _config(self) -> Config:
        """Decided once: when the nodes with GPUs are lost, a round waits for others and does not go on without."""
        gpus = {"gpus_per_trainer": gpus_per_worker(self._given, whole_model=False)}
        return self._given.model_copy(update={"resources": self._given.resources.model_copy(update=gpus)})

    @property
    def goes_on(self) -> bool:
        """The next stage has workers already."""
        return bool(self.workers) and not self.apart

    def stage(self, *, most: int, whole_model: bool) -> list[Any]:
        """Workers for the next stage, from one to `most`; the first of them has loaded. `whole_model`: the stage needs
        more of it than the suffix.

        Those that the stage has no work for are ended. One of them may hold the place in which a worker that died
        would start again, with a call that was made to it alone."""
        whole_model = whole_model or not self.apart
        if whole_model != self._whole_model:
            self.keep(0)
            self._whole_model = whole_model
        self._nodes, self._look_again, self.shrunk = _nodes(), time.monotonic() + LOOK_SECONDS, False
        wanted = max(1, min(most, self._room(self._nodes.values())))
        self.keep(wanted)
        more = range(wanted - len(self.workers))
        started = [start_worker(self._config, whole_model=whole_model) for _ in more]
        if not self.workers:
            loading = {worker.load.remote(whole_model=whole_model): worker for worker in started}
            (loaded,), _ = ray.wait(list(loading), num_returns=1)
            started.sort(key=lambda worker: worker is not loading[loaded])
        self.workers += started
        return self.workers

    def keep(self, first: int) -> None:
        for surplus in self.workers[first:]:
            ray.kill(surplus)
        self.workers = self.workers[:first]

    def end(self, worker: Any) -> None:
        ray.kill(worker)
        self.workers = [one for one in self.workers if one is not worker]

    def look(self, *, most: int) -> list[Any]:
        """Started now, at most so many: workers for the room of nodes that have joined. `shrunk` says whether one of
        those that were there has gone."""
        if time.monotonic() < self._look_again:
            return []
        nodes, self._look_again = _nodes(), time.monotonic() + LOOK_SECONDS
        self.shrunk = not self._nodes.keys() <= nodes.keys()
        room = self._room([nodes[joined] for joined in nodes.keys() - self._nodes.keys()])
        self._nodes |= nodes
        started = [start_worker(self._config, whole_model=self._whole_model) for _ in range(min(most, room))]
        self.workers += started
        return started

    def _room(self, nodes: Collection[Mapping[str, float]]) -> int:
        """How many workers they can hold, and keep busy: on a node's CPUs more than there are cores take turns."""
        cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
        cpus_each = max(self._config.training.threads, self._config.resources.cpus_per_trainer)
        gpus_each = gpus_per_worker(self._config, whole_model=self._whole_model)
        return int(min(cpus / cpus_each, gpus / gpus_each) if gpus_each else cpus / cpus_each)


def _nodes() -> dict[str, Mapping[str, float]]:
    """What each living node has."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def extract_shards(pool: WorkerPool, shards: Sequence[ShardPlan]) -> dict[str, Any]:
    """References to the shards' activations by digest: they stay in the object store. Trainers read their siblings'
    keys from the store, so this comes before any of them starts."""
    # No retries: for what they made, Ray would call again behind a call that waits for it. Lost is lost.
    tasks = [_stream("extract", shard, max_task_retries=0) for shard in shards]
    counted: set[int] = set()
    activations = {}
    for index, news in _side_by_side(pool, tasks, fetched=False):
        if index in counted and news is not None:
            activations[shards[index].digest] = news
        elif news is not None:
            fetch(news)
            counted.add(index)
    return activations


def train_shards(pool: WorkerPool, jobs: Sequence[Job], activations: Mapping[str, Any]) -> Iterator[ShardStep]:
    """Train the shards, one per worker at a time, and say how each is getting on.

    Raises what a shard raised; finished shards stay finished.
    """
    tasks = [_stream("train", memory, shard, activations[shard.digest]) for memory, shard in jobs]
    for index, news in _side_by_side(pool, tasks):
        yield ShardStep(jobs[index][1], news)


def merge_memories(pool: WorkerPool, memories: Sequence[MemoryPlan]) -> list[ObjectRef]:
    merged: dict[int, ObjectRef] = {}
    for index, news in _side_by_side(pool, [_stream("merge", memory) for memory in memories]):
        if news is not None:
            merged[index] = news
    return [merged[index] for index in range(len(memories))]


def polish_memories(
    pool: WorkerPool,
    memories: Sequence[MemoryPlan],
    merged: Sequence[ObjectRef],
    activations: Mapping[str, Any],
) -> Iterator[MemoryStep]:
    """Polish the memories, one per worker at a time; the last news of each is where it lies."""
    tasks = [
        _stream("polish", memory, reference, *(activations[shard.digest] for shard in memory.shards))
        for memory, reference in zip(memories, merged, strict=True)
    ]
    for index, news in _side_by_side(pool, tasks):
        if news is not None:
            yield MemoryStep(memories[index], news)


def _stream(call: str, *arguments: Any, **options: Any) -> Task:
    options, within = {"num_returns": "streaming", **options}, Within(ids(), here())
    return lambda worker: getattr(worker, call).options(**options).remote(*arguments, within=within)


def _side_by_side(pool: WorkerPool, tasks: Sequence[Task], *, fetched: bool = True) -> Iterator[tuple[int, Any]]:
    """Run the tasks; yields (task, what it streamed or a reference to it), and (task, None) at its end.

    A task that goes with its worker's node is not run again here, as what it needs may have gone too: the other ones
    are finished, and then WorkersLost is raised.
    """
    waiting = deque(enumerate(tasks))
    # A worker gets its first task when it is up: where the cluster has less room than it says, the others do it all.
    starting = {worker.ready.remote(): worker for worker in pool.workers}
    running: dict[Any, tuple[Any, int]] = {}
    idle: list[Any] = []
    undone, lost = len(tasks), WorkersLost("There were no workers.")

    def give(worker: Any) -> None:
        if waiting:
            index, start = waiting.popleft()
            running[start(worker)] = (worker, index)
        else:
            idle.append(worker)

    while running or (waiting and starting):
        starting |= {worker.ready.remote(): worker for worker in pool.look(most=len(waiting))}
        if pool.shrunk and not waiting:  # a worker of the lost node may need a place to start again, with its task
            for worker in [*idle, *starting.values()]:
                pool.end(worker)
            idle, starting = [], {}
        ready, _ = ray.wait([*running, *starting], num_returns=1, timeout=LOOK_SECONDS)
        for news in ready:
            worker, index = (starting[news], None) if news in starting else running[news]
            try:
                item = fetch(news) if index is None else _next(news, fetched=fetched)
            except WorkersLost as error:
                lost = error
                (starting if index is None else running).pop(news)
                pool.end(worker)
                continue
            if index is None:
                give(starting.pop(news))
                continue
            if item is None:
                undone -= 1
                del running[news]
                give(worker)
            yield index, item
    if undone:
        raise lost


def _next(stream: Any, *, fetched: bool) -> Any:
    """What it streamed, or a reference to it; None at its end."""
    try:
        item = next(stream)
    except StopIteration:
        fetch(stream.completed())
        return None
    return fetch(item) if fetched else item
