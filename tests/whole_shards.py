"""Shards that lie in memory as whole matrices, as the merge methods read them: in row blocks of any size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.wise.merge import MergeOptions, merge


@dataclass(frozen=True)
class Rows:
    first_row: int
    deltas_KRF: Tensor
    trained_KRF: Tensor


@dataclass(frozen=True)
class MergeInput:
    """Everything that a merge is given."""

    deltas_KDF: Tensor
    trained_KDF: Tensor
    keys: Sequence[Tensor]  # one N_k × F per shard
    indices_K: list[int]
    seed: int = 0
    density: float = 1.0
    keyed_ridge: float = 1.0
    block_rows: int = 2
    threads: int = 1

    def blocks(self) -> Iterator[Rows]:
        for first_row in range(0, self.deltas_KDF.shape[1], self.block_rows):
            rows = slice(first_row, first_row + self.block_rows)
            yield Rows(first_row, self.deltas_KDF[:, rows], self.trained_KDF[:, rows])

    def magnitudes_E(self, shard: int) -> Tensor:
        return self.deltas_KDF[shard][self.trained_KDF[shard]].abs()

    def keys_NF(self, shard: int) -> Tensor:
        return self.keys[shard]


def merged(method: str, given_: MergeInput) -> Tensor:
    options = MergeOptions(given_.seed, given_.density, given_.keyed_ridge, given_.threads)
    return torch.cat(list(merge(method, given_, options)))
