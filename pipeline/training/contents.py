"""What a release is made of, as a live release changes it: entries leave, a fresh memory's entries join."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.models.loaded_release import decode_router, encode_router
from pipeline.storage.bank import BankEntry, decode_bank, encode_bank
from pipeline.storage.deltas import decode_matrix, encode_matrix
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import ObjectRef, Release
from pipeline.training.router_growth import without
from pipeline.wise.routing import Router, empty_router


@dataclass(frozen=True)
class Contents:
    memories: tuple[ObjectRef, ...]
    fresh: int  # how many of the memories are: the last ones
    entries: tuple[BankEntry, ...]
    router: Router
    fitted_on: int  # entries that the bank had when the router was last fitted
    readouts: tuple[Tensor, ...] | None  # T × D of every entry; None: memories are read at the prompt's own keys

    @property
    def first_fresh(self) -> int:
        return len(self.memories) - self.fresh

    def keep(self, places: Sequence[int]) -> "Contents":
        """Only the entries at these places. Fresh memories that no entry is left in go too."""
        entries = [self.entries[place] for place in places]
        needed = {entry.memory for entry in entries}
        memories = [index for index in range(len(self.memories)) if index < self.first_fresh or index in needed]
        number = {index: new for new, index in enumerate(memories)}
        entries = [replace(entry, memory=number[entry.memory]) for entry in entries]
        return Contents(
            memories=tuple(self.memories[index] for index in memories),
            fresh=len(memories) - self.first_fresh,
            entries=tuple(entries),
            router=without(self.router, places, memories=[entry.memory for entry in entries]),
            fitted_on=self.fitted_on,
            readouts=None if self.readouts is None else tuple(self.readouts[place] for place in places),
        )

    def with_memory(
        self, memory: ObjectRef, entries: Sequence[BankEntry], readouts: Mapping[str, Tensor], *, taught_on: bool
    ) -> "Contents":
        """With the entries of a fresh memory, which takes the place of the last one if that was `taught_on`. The
        router is still without them. `readouts`: of all that the memory holds, by edit id."""
        memories = (*self.memories[: len(self.memories) - taught_on], memory)
        joined = (*self.entries, *(replace(entry, memory=len(memories) - 1) for entry in entries))
        said = self.readouts
        if said is not None:
            stay = zip(self.entries, said, strict=True)
            last = len(memories) - 1
            said = (
                *(readouts[entry.edit_id] if entry.memory == last else rows_TD for entry, rows_TD in stay),
                *(readouts[entry.edit_id] for entry in entries),
            )
        fresh = self.fresh + (not taught_on)
        return replace(self, memories=memories, fresh=fresh, entries=joined, readouts=said)


def no_contents(width: int, *, matched: bool) -> Contents:
    """Before the first release. `width`: D."""
    return Contents((), 0, (), empty_router(width), fitted_on=0, readouts=() if matched else None)


def read_contents(store: ObjectStore, release: Release, *, matched: bool) -> Contents:
    """`matched`: how the release is read where it has no entry that shows it. Raises CorruptObject and NotFound."""
    entries = decode_bank(store.read(release.bank.path, sha256=release.bank.sha256))
    readouts: tuple[Tensor, ...] | None = () if matched and not entries else None
    if release.readouts is not None:
        matrix, _ = decode_matrix(store.read(release.readouts.path, sha256=release.readouts.sha256))
        readouts = torch.split(torch.from_numpy(matrix.copy()), [len(entry.target_ids) for entry in entries])
    return Contents(
        memories=release.memories,
        fresh=release.live.memories if release.live else 0,
        entries=tuple(entries),
        router=decode_router(store.read(release.router.path, sha256=release.router.sha256), device=torch.device("cpu")),
        fitted_on=release.live.fitted_on if release.live else len(entries),
        readouts=readouts,
    )


def write_contents(store: ObjectStore, contents: Contents) -> dict[str, object]:
    """The fields of a release that name them."""
    rows = contents.readouts
    return {
        "memories": contents.memories,
        "router": put_named(store, "routers", encode_router(contents.router), suffix="safetensors"),
        "bank": put_named(store, "banks", encode_bank(contents.entries), suffix="parquet"),
        "readouts": put_named(store, "readouts", encode_matrix(torch.cat(rows).numpy()), suffix="parquet")
        if rows
        else None,
        "edits": len(contents.entries),
    }


def put_named(store: ObjectStore, folder: str, data: bytes, *, suffix: str) -> ObjectRef:
    """Stored under a name made of its bytes."""
    path = f"{folder}/{hashlib.sha256(data).hexdigest()[:24]}.{suffix}"
    return ObjectRef(path=path, sha256=store.put(path, data))
