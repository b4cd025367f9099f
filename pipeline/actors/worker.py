"""Ray actor of a round: it extracts, trains, merges, polishes, fits the router and measures."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import ray
import torch
from transformers import PreTrainedModel

from pipeline.config import Config
from pipeline.edits import Edit
from pipeline.evaluation.measure import Measurement, measure
from pipeline.evaluation.study import Case, Study, study
from pipeline.logs import about, logger
from pipeline.models.base_model import BaseModel, identify, load_base_model, model_folder
from pipeline.models.loaded_release import load_release
from pipeline.models.suffix import load_suffix
from pipeline.storage.object_store import open_store
from pipeline.storage.releases import ObjectRef, Release
from pipeline.traces import span, trace_to
from pipeline.training.activations import Activations
from pipeline.training.candidate import Candidate, FittedRouter, assemble, route
from pipeline.training.carry import carry
from pipeline.training.contexts import stored_texts
from pipeline.training.edit_stream import EditStream
from pipeline.training.fit import Progress
from pipeline.training.memory import merge_memory, polish_memory
from pipeline.training.planning import MemoryPlan, Plan, ShardPlan
from pipeline.training.shard import extract_shard, train_shard

log = logger(__name__)


@dataclass(frozen=True)
class Within:
    """What a call is part of, for its log lines and its span."""

    ids: Mapping[str, str] = field(default_factory=dict)
    trace: Mapping[str, str] = field(default_factory=dict)


ALONE = Within()


class Worker:
    """What a call needs of the model is loaded by the first call that needs it: the whole of it to extract, to fit the
    router and to measure; the suffix alone to train and polish; nothing to merge. So a worker that only trains never
    holds the rest.

    Nothing is loaded in `__init__`: an exception there would end a restarting actor for good. Calls that a pool hands
    out are streams. Every call may be repeated.
    """

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.training.threads)
        self._config = config
        self._store = open_store(config.store)

    @cached_property
    def _base(self) -> BaseModel:
        return load_base_model(self._config.model)

    @cached_property
    def _suffix(self) -> PreTrainedModel:
        layer = identify(self._config.model).layer
        suffix = load_suffix(model_folder(self._config.model), layer, dtype=self._config.model.dtype)
        return suffix.to("cuda") if torch.cuda.is_available() else suffix

    @cached_property
    def _texts(self) -> list[str]:
        training = self._config.training
        return stored_texts(self._base, self._store, tokens=training.prefix_tokens, seed=training.seed)

    def ready(self) -> None:
        """Answers when the actor has a place in the cluster."""

    def load(self, *, whole_model: bool) -> None:
        """The model and the texts it writes by itself, or its suffix, before they are needed."""
        pa.array([])  # imports pandas, which would take half a second of the first shard
        _ = self._texts if whole_model else self._suffix

    def extract(self, shard: ShardPlan, *, within: Within = ALONE) -> Iterator[int | Activations | EditStream]:
        """How many wordings it has, then what its trainer needs of them; keys and states are in the store."""
        with self._part("extract shard", within, shard=shard.digest):
            extracted = extract_shard(self._base, self._store, shard, prefix_pool=self._texts, config=self._config)
        yield len(extracted)
        yield extracted

    def train(
        self, memory: MemoryPlan, shard: ShardPlan, extracted: Activations | EditStream, *, within: Within = ALONE
    ) -> Iterator[Progress]:
        """Streams progress; when the stream ends, the delta is in the store."""
        identity = identify(self._config.model)
        with self._part("train shard", within, shard=shard.digest):
            yield from train_shard(
                self._suffix,
                self._store,
                memory,
                shard,
                extracted,
                config=self._config,
                fingerprint=identity.fingerprint,
                layer=identity.layer,
            )

    def merge(self, memory: MemoryPlan, *, within: Within = ALONE) -> Iterator[ObjectRef]:
        """Gathers the shards' deltas from the store; one item, where the merged memory lies."""
        with self._part("merge memory", within, memory=memory.digest):
            yield merge_memory(self._store, memory, config=self._config)

    def polish(
        self, memory: MemoryPlan, merged: ObjectRef, *activations: Activations, within: Within = ALONE
    ) -> Iterator[Progress | ObjectRef]:
        """Streams progress; the last item says where the polished memory lies."""
        with self._part("polish memory", within, memory=memory.digest):
            yield from polish_memory(self._suffix, self._store, memory, merged, activations, config=self._config)

    @contextmanager
    def _part(self, what: str, within: Within, **of: str) -> Iterator[None]:
        """One call of a round's pool, in log and trace."""
        trace_to(self._config.observe.traces)
        began = time.monotonic()
        with about(**within.ids, **of), span(what, within=within.trace, **of):
            yield
            log.info("%s: %.1f s", what, time.monotonic() - began)

    def route(self, plan: Plan, standing: Release | None) -> FittedRouter:
        """The states of all the plan's edits must be in the store."""
        return route(self._base, self._store, plan, standing, texts=self._texts, config=self._config)

    def assemble(
        self, plan: Plan, memories: Sequence[ObjectRef], fitted: FittedRouter, parent: int | None
    ) -> Candidate:
        return assemble(
            self._base, self._store, plan, memories, fitted, texts=self._texts, config=self._config, parent=parent
        )

    def measure(self, release: Release, edits: Sequence[Edit]) -> Measurement:
        return measure(
            self._base,
            load_release(self._store, release, self._base),
            edits,
            most_edits=self._config.round.evaluate_edits,
            seed=self._config.training.seed,
        )

    def carry(self, candidate: Release, head: Release) -> Release:
        """The candidate as the successor of a live release."""
        return carry(self._store, candidate, head, config=self._config)

    def study(self, release: Release, cases: Sequence[Case], measured: Measurement) -> Study:
        return study(self._base, load_release(self._store, release, self._base), cases, measured)


def start_worker(config: Config, *, whole_model: bool = True) -> Any:
    """`whole_model`: it may be asked for more than merging and training with the suffix."""
    return (
        ray.remote(Worker)
        .options(
            num_cpus=config.resources.cpus_per_trainer,
            num_gpus=gpus_per_worker(config, whole_model=whole_model),
            scheduling_strategy=config.resources.placement,
            max_restarts=config.resources.max_restarts,
            max_task_retries=config.resources.max_restarts,
        )
        .remote(config)
    )


def gpus_per_worker(config: Config, *, whole_model: bool) -> float:
    """The configured share; by default a whole GPU where the cluster has any, else the CPU."""
    share = config.resources.gpus_per_trainer
    if whole_model and config.resources.gpus_per_model != "auto":
        share = config.resources.gpus_per_model
    if share == "auto":
        return 1.0 if ray.cluster_resources().get("GPU", 0) > 0 else 0.0
    return share
