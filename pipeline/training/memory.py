"""Merge the shards of one memory, look whether its edits hold in it, and train on where they do not.

Merging is what lets shards train apart, and what costs edits: in one matrix they meet for the first time. So the merged
memory is audited on all wordings of its edits, and those that do not hold get a second attempt, with as many that hold
beside them: `polish`, a few steps of the suffix from the merged ΔW on, inside the union of the shards' masks. It is not
in the paper; `merge.polish_steps: 0` leaves it out.
"""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config import Config
from pipeline.errors import CorruptObject
from pipeline.storage.deltas import MemoryMetadata, SideMemory, decode_memory, encode_memory, encode_memory_blocks
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import ObjectRef
from pipeline.training.activations import Activations, joined
from pipeline.training.fit import Progress, fit
from pipeline.training.planning import MemoryPlan
from pipeline.training.shard_files import read_metadata, shard_mask
from pipeline.training.stored_shards import StoredShards
from pipeline.wise.merge import METHODS, MergeOptions, merge


def find_memory(
    store: ObjectStore, memory: MemoryPlan, *, config: Config, published: Mapping[str, ObjectRef] | None = None
) -> ObjectRef | None:
    """The memory as it is served, where an earlier round finished it. What is `published`, by path, is not read to
    learn its checksum: a round that changes little must not read every matrix there is."""
    path = _path(memory, config, polished=config.merge.polish_steps > 0)
    if published and path in published and store.exists(path):
        return published[path]
    return _find(store, path)


def bytes_to_merge(store: ObjectStore, memories: Sequence[MemoryPlan], *, config: Config) -> int:
    """Of the shard deltas that `merge_memory` has yet to read for these memories: the values inside their masks, in
    float32. The shards are trained."""
    shards = [shard for memory in memories if not _is_merged(store, memory, config) for shard in memory.shards]
    if not shards:
        return 0
    first = read_metadata(store, shards[0])  # they all have the same shape
    return int(4 * first.rows * first.columns * first.density) * len(shards)


def merge_memory(store: ObjectStore, memory: MemoryPlan, *, config: Config) -> ObjectRef:
    """Place and checksum of the merged, not yet polished memory; found, or merged now. May be repeated."""
    path = _path(memory, config, polished=False)
    found = _find(store, path)
    if found is not None:
        return found
    shards = StoredShards(store, memory.shards)
    method, first = config.merge.method, shards.metadata_K[0]
    density = METHODS[method].density if config.merge.density == "auto" else config.merge.density
    options = MergeOptions(
        seed=memory.seed,
        density=density,
        keyed_ridge=config.merge.keyed_ridge,
        threads=config.training.threads,
    )
    metadata = MemoryMetadata(
        model_fingerprint=first.model_fingerprint,
        layer=first.layer,
        method=method,
        shards=len(memory.shards),
        edits_digest=memory.digest,
        config_digest=config.digest("shards", "training", "merge"),
        rows=first.rows,
        columns=first.columns,
    )
    merged = (block_RF.numpy() for block_RF in merge(method, shards, options))
    return ObjectRef(path=path, sha256=store.put(path, encode_memory_blocks(metadata, merged)))


def polish_memory(
    suffix: PreTrainedModel,
    store: ObjectStore,
    memory: MemoryPlan,
    merged: ObjectRef,
    activations: Sequence[Activations],
    *,
    config: Config,
) -> Iterator[Progress | ObjectRef]:
    """Yields Progress, first of the merged memory as it is, and at last where the polished memory lies.

    `activations`: of all the memory's shards, in any order. May be repeated and killed anywhere."""
    side_memory = decode_memory(store.read(merged.path, sha256=merged.sha256))
    device = suffix.device
    held: list[int] = []
    for item in fit(
        suffix,
        joined(activations).to(device),
        mask_DF=_trained(store, memory).to(device),
        sibling_keys_MF=torch.zeros(0, side_memory.metadata.columns),
        sibling_penalty=0.0,
        training=config.training.model_copy(update={"max_steps": config.merge.polish_steps}),
        seed=config.training.seed,
        start_DF=torch.from_numpy(side_memory.matrix.copy()).to(device),
    ):
        if isinstance(item, Progress):
            held.append(item.holding)
            yield item
        else:
            # More steps are no promise: what was merged stays where it held more.
            better = held[-1] >= held[0]
            polished = SideMemory(side_memory.metadata, item.cpu().numpy() if better else side_memory.matrix)
            path = _path(memory, config, polished=True)
            yield ObjectRef(path=path, sha256=store.put(path, encode_memory(polished)))


def _trained(store: ObjectStore, memory: MemoryPlan) -> Tensor:
    """D × F: the entries that any of the memory's shards could move."""
    masks = (shard_mask(read_metadata(store, shard)) for shard in memory.shards)
    return functools.reduce(torch.logical_or, masks)


def _is_merged(store: ObjectStore, memory: MemoryPlan, config: Config) -> bool:
    return store.exists(_path(memory, config, polished=False))


def _path(memory: MemoryPlan, config: Config, *, polished: bool) -> str:
    """Named by the memory's shards and by how they are merged."""
    digest = hashlib.sha256(f"{memory.digest}{config.digest('merge')}".encode()).hexdigest()[:24]
    return f"memories/{digest}{'-polished' if polished else ''}.parquet"


def _find(store: ObjectStore, path: str) -> ObjectRef | None:
    if not store.exists(path):
        return None
    data = store.read(path)
    try:
        decode_memory(data)
    except CorruptObject as error:
        raise CorruptObject(f"{path} in {store.uri} is damaged; remove it and run the round again. ({error})") from None
    return ObjectRef(path=path, sha256=hashlib.sha256(data).hexdigest())
