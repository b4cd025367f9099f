"""Merge the shards of one memory: deltas from Parquet in, one side memory in Parquet out."""

import hashlib

import torch

from pipeline.config import Config
from pipeline.errors import CorruptObject
from pipeline.storage.deltas import MemoryMetadata, SideMemory, decode_memory, encode_memory
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import ObjectRef
from pipeline.training.planning import MemoryPlan
from pipeline.training.shard_files import read_delta, read_keys
from pipeline.wise.merge import METHODS, MergeInput


def memory_path(memory: MemoryPlan, config: Config) -> str:
    """Where the merged memory lies: named by its shards and by how they are merged."""
    digest = hashlib.sha256(f"{memory.digest}{config.digest('merge')}".encode()).hexdigest()[:24]
    return f"memories/{digest}.parquet"


def merge_memory(store: ObjectStore, memory: MemoryPlan, *, config: Config) -> ObjectRef:
    """The merged memory's place and checksum; merged now, or found from an earlier round. May be repeated."""
    path = memory_path(memory, config)
    if store.exists(path):
        data = store.read(path)
        try:
            decode_memory(data)
        except CorruptObject as error:
            raise CorruptObject(
                f"{path} in {store.uri} is damaged; remove it and run the round again. ({error})"
            ) from None
        return ObjectRef(path=path, sha256=hashlib.sha256(data).hexdigest())
    deltas, masks, metadata = zip(*(read_delta(store, shard) for shard in memory.shards), strict=True)
    method = METHODS[config.merge.method]
    merged_DF = method.merge(
        MergeInput(
            deltas_KDF=torch.stack(deltas),
            trained_KDF=torch.stack(masks),
            keys_NF=[read_keys(store, shard) for shard in memory.shards],
            ties_density=config.merge.ties_density,
            keyed_ridge=config.merge.keyed_ridge,
        )
    )
    side_memory = SideMemory(
        metadata=MemoryMetadata(
            model_fingerprint=metadata[0].model_fingerprint,
            layer=metadata[0].layer,
            method=config.merge.method,
            shards=len(memory.shards),
            edits_digest=memory.digest,
            config_digest=config.digest("shards", "training", "merge"),
            rows=merged_DF.shape[0],
            columns=merged_DF.shape[1],
        ),
        matrix=merged_DF.numpy(),
    )
    return ObjectRef(path=path, sha256=store.put(path, encode_memory(side_memory)))
