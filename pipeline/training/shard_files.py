"""What a shard leaves in the store: `shards/<digest>/{keys,states,delta}.parquet`, written in this order.

All three are functions of the digest. The delta comes last; with all three the shard is finished.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import CorruptObject
from pipeline.storage.deltas import (
    DeltaMetadata,
    DeltaRows,
    StoredDelta,
    decode_matrix,
    encode_delta,
    encode_matrix,
)
from pipeline.storage.object_store import ObjectStore
from pipeline.training.planning import ShardPlan
from pipeline.wise.masks import subspace_mask

Decoded = TypeVar("Decoded")
FILES = ("keys", "states", "delta")


@dataclass(frozen=True)
class BareWording:
    """An edit asked bare: its target, T tokens with the end of sequence, and A(x) where each of them is predicted."""

    target_ids: tuple[int, ...]
    keys_TF: Tensor


def is_trained(store: ObjectStore, shard: ShardPlan) -> bool:
    """All three are there; where one was removed because it is damaged, the shard is made again."""
    return all(store.exists(_path(shard, name)) for name in FILES)


def write_keys(
    store: ObjectStore, shard: ShardPlan, *, bare: Sequence[BareWording], chat_MF: Tensor, prefixed_MF: Tensor
) -> None:
    """A(x) of the shard's own targets: the bare wordings first, then those in a chat, then those behind a prefix."""
    keys_MF = torch.cat([*(wording.keys_TF for wording in bare), chat_MF, prefixed_MF])
    description = {
        "unprefixed": len(keys_MF) - len(prefixed_MF),
        "target_ids": [list(wording.target_ids) for wording in bare],
    }
    store.put(_path(shard, "keys"), encode_matrix(keys_MF.numpy(), description))


def read_keys(store: ObjectStore, shard: ShardPlan, *, prefixed: bool = True) -> Tensor:
    """Keys of all wordings (the keyed merge fits them all), or of those without a prefix (the siblings' penalty)."""
    keys_MF, description = _read(store, _path(shard, "keys"), decode_matrix)
    return torch.from_numpy(keys_MF.copy())[: None if prefixed else description["unprefixed"]]


def read_bare_wordings(store: ObjectStore, shard: ShardPlan) -> list[BareWording]:
    """One per edit of the shard, in its order."""
    keys_MF, description = _read(store, _path(shard, "keys"), decode_matrix)
    targets = [tuple(ids) for ids in description["target_ids"]]
    # The bare wordings alone are copied: of a bank of many shards the others' keys must not stay in memory.
    bare_MF = torch.from_numpy(keys_MF[: sum(map(len, targets))].copy())
    return [
        BareWording(target_ids=target_ids, keys_TF=keys_TF)
        for target_ids, keys_TF in zip(targets, torch.split(bare_MF, [len(ids) for ids in targets]), strict=True)
    ]


def write_states(store: ObjectStore, shard: ShardPlan, states_ND: Tensor, *, wordings: Sequence[int]) -> None:
    """States of all wordings, and how many of them belong to each edit: the router's keys."""
    store.put(_path(shard, "states"), encode_matrix(states_ND.numpy(), {"wordings": list(wordings)}))


def read_states(store: ObjectStore, shard: ShardPlan) -> list[Tensor]:
    """One W × D tensor per edit of the shard, in its order."""
    return _states(store, _path(shard, "states"), edits=len(shard.edits))


def states_of_round(store: ObjectStore, round_id: str) -> dict[str, Tensor]:
    """Edit id → W × D states of every edit in the plan of a round. Raises NotFound and CorruptObject."""
    plan = json.loads(store.read(f"rounds/{round_id}/plan.json"))
    found: dict[str, Tensor] = {}
    for shard in (shard for memory in plan["memories"] for shard in memory["shards"]):
        states = _states(store, f"shards/{shard['digest']}/states.parquet", edits=len(shard["edits"]))
        found |= zip(shard["edits"], states, strict=True)
    return found


def _states(store: ObjectStore, path: str, *, edits: int) -> list[Tensor]:
    states_ND, description = _read(store, path, decode_matrix)
    wordings = description["wordings"]
    if len(wordings) != edits or sum(wordings) != len(states_ND):
        raise CorruptObject(f"{path} does not belong to its shard; remove it and run the round again.")
    return list(torch.split(torch.from_numpy(states_ND.copy()), wordings))


def write_delta(
    store: ObjectStore, shard: ShardPlan, delta_DF: Tensor, mask_DF: Tensor, *, metadata: DeltaMetadata
) -> None:
    delta = DeltaRows(values=delta_DF[mask_DF].numpy(), row_lengths=mask_DF.sum(dim=1).numpy().astype(np.int32))
    store.put(delta_path(shard.digest), encode_delta(metadata, delta))


def read_metadata(store: ObjectStore, shard: ShardPlan) -> DeltaMetadata:
    """What the shard's delta was computed from."""
    with _damage_named(store, delta_path(shard.digest)), store.open(delta_path(shard.digest)) as file:
        return StoredDelta(file).metadata


def read_delta_blocks(store: ObjectStore, shard: ShardPlan, *, rows: int) -> Iterator[DeltaRows]:
    """ΔW of the shard in blocks of so many rows, from the top."""
    with _damage_named(store, delta_path(shard.digest)), store.open(delta_path(shard.digest)) as file:
        yield from StoredDelta(file).blocks(rows)


def shard_mask(meta: DeltaMetadata, *, first_row: int = 0, rows: int | None = None) -> Tensor:
    """D × F, or a block of its rows: regenerated from the seed in the metadata."""
    return subspace_mask(
        (meta.rows if rows is None else rows, meta.columns),
        seed=meta.seed,
        shard=meta.mask_index,
        density=meta.density,
        disjoint=meta.masks == "disjoint",
        first_row=first_row,
    )


def _read(store: ObjectStore, path: str, decode: Callable[[bytes], Decoded]) -> Decoded:
    with _damage_named(store, path):
        return decode(store.read(path))


@contextlib.contextmanager
def _damage_named(store: ObjectStore, path: str) -> Iterator[None]:
    try:
        yield
    except CorruptObject as error:
        raise CorruptObject(f"{path} in {store.uri} is damaged; remove it and run the round again. ({error})") from None


def shard_path(digest: str, name: str) -> str:
    """Where the file `name` (one of FILES) of the shard with this digest lies."""
    return f"shards/{digest}/{name}.parquet"


def delta_path(digest: str) -> str:
    return shard_path(digest, "delta")


def _path(shard: ShardPlan, name: str) -> str:
    return shard_path(shard.digest, name)
