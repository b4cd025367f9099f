"""The shards of one memory as a merge reads them from the store: row blocks of all deltas, in step.

A block becomes dense when it is merged. What that costs most is drawing the masks again from their seeds.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import CorruptObject
from pipeline.storage.deltas import DeltaMetadata, DeltaRows, block_rows
from pipeline.storage.object_store import ObjectStore
from pipeline.training.planning import ShardPlan
from pipeline.training.shard_files import delta_path, read_delta_blocks, read_keys, read_metadata, shard_mask


class StoredShards:
    """A memory's trained shards, as pipeline/wise/row_blocks.py wants them. Raises CorruptObject, naming the file."""

    def __init__(self, store: ObjectStore, shards: Sequence[ShardPlan]) -> None:
        self._store = store
        self._shards = shards
        self.indices_K = [shard.index for shard in shards]
        self.metadata_K = [read_metadata(store, shard) for shard in shards]
        self._block_rows = block_rows(self.metadata_K[0].columns)

    def blocks(self) -> Iterator["StoredBlock"]:
        first_row = 0
        for stored_K in zip(*map(self._stored, self._shards), strict=True):
            yield StoredBlock(first_row, stored_K, self.metadata_K)
            first_row += len(stored_K[0].row_lengths)

    def magnitudes_E(self, shard: int) -> Tensor:
        meta, end = self.metadata_K[shard], 0
        magnitudes_E = np.empty(meta.rows * meta.columns, np.float32)  # what is never written takes no memory
        for block in self._stored(self._shards[shard]):
            start, end = end, end + block.values.size
            np.abs(block.values, out=magnitudes_E[start:end])
        return torch.from_numpy(magnitudes_E[:end])

    def keys_NF(self, shard: int) -> Tensor:
        return read_keys(self._store, self._shards[shard])

    def _stored(self, shard: ShardPlan) -> Iterator[DeltaRows]:
        return read_delta_blocks(self._store, shard, rows=self._block_rows)


@dataclass(frozen=True)
class StoredBlock:
    """A RowBlock as it is stored: of each shard the values inside its mask."""

    first_row: int
    stored_K: Sequence[DeltaRows]
    metadata_K: Sequence[DeltaMetadata]

    @functools.cached_property
    def trained_KRF(self) -> Tensor:
        rows = len(self.stored_K[0].row_lengths)
        return torch.stack([shard_mask(meta, first_row=self.first_row, rows=rows) for meta in self.metadata_K])

    @functools.cached_property
    def deltas_KRF(self) -> Tensor:
        deltas_KRF = torch.zeros(self.trained_KRF.shape)
        _K, R, F = deltas_KRF.shape
        for k, (stored, trained_RF) in enumerate(zip(self.stored_K, self.trained_KRF, strict=True)):
            entries_E = np.flatnonzero(trained_RF)
            ends_R = np.searchsorted(entries_E, F * np.arange(1, R + 1))
            if not np.array_equal(ends_R, stored.row_lengths.cumsum()):
                path = delta_path(self.metadata_K[k].edits_digest)
                raise CorruptObject(f"{path} does not fit its mask; remove it and run the round again.")
            deltas_KRF[k].numpy().reshape(-1)[entries_E] = stored.values
        return deltas_KRF
