"""Side memories between host and device: on the device lie those that were read last, as many as fit.

Every memory of a loaded release is held on the host, in the model's dtype (90 MB for a 7B model in bfloat16), and
releases that name the same memory share it. It goes to the device of layer L when an answer first reads it, and when
there is no room, the least recently read ones leave. What answers read:

    addressing `matched`    no matrix while an answer follows its edit's target (its readouts go with the row); from the
                            token on that leaves it, its own memory
    addressing `own`        its memory, at every token
    routing by Δ_act        all memories, at every prompt: a release that does not fit streams through the device

Where the device is the CPU, host and device hold the same tensor, and nothing moves.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, overload
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from pipeline.models.base_model import BaseModel
from pipeline.storage.deltas import decode_memory
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import ObjectRef

SHARE_OF_FREE = 0.5  # `auto`: the other half is for the keys and values of running answers


@dataclass(eq=False)
class HeldMemory:
    """ΔW, D × F. `read_at` counts reads of all memories."""

    host_DF: Tensor
    device_DF: Tensor | None = None
    read_at: int = 0


class MemoryCache:
    """The side memories of all releases that a process has loaded. Many threads may `hold`, one may read: the engine's.

    `device_gib`: how much of the device they may take; at least one memory always may. `auto` is half of what is free
    on a GPU when the first one is read. What no release names any more leaves host and device by itself.
    """

    def __init__(self, base: BaseModel, *, device_gib: float | Literal["auto"] = "auto") -> None:
        self._base, self._device_gib = base, device_gib
        self._by_checksum: WeakValueDictionary[str, HeldMemory] = WeakValueDictionary()
        self._on_device: WeakSet[HeldMemory] = WeakSet()
        self._room: float | None = None  # bytes
        self._reads = count(1)

    def hold(self, store: ObjectStore, references: Iterable[ObjectRef]) -> "SideMemories":
        """The memories, read from the store and verified unless a loaded release holds them already.

        Raises CorruptObject when one differs from its checksum."""
        return SideMemories(self, [self._held(store, reference) for reference in references])

    def read(self, memory: HeldMemory) -> Tensor:
        """ΔW on the device of layer L."""
        memory.read_at = next(self._reads)
        if memory.device_DF is None:
            self._make_room(memory.host_DF.nbytes)
            memory.device_DF = memory.host_DF.to(self._base.layer_device)
            self._on_device.add(memory)
        return memory.device_DF

    def _held(self, store: ObjectStore, reference: ObjectRef) -> HeldMemory:
        held = self._by_checksum.get(reference.sha256)
        if held is None:
            matrix = decode_memory(store.read(reference.path, sha256=reference.sha256)).matrix
            held = HeldMemory(torch.tensor(matrix, dtype=self._base.model.dtype))
            self._by_checksum[reference.sha256] = held
        return held

    def _make_room(self, wanted: int) -> None:
        if self._room is None:
            auto = self._device_gib == "auto"
            self._room = SHARE_OF_FREE * _free(self._base.layer_device) if auto else float(self._device_gib) * 2**30
        resident = sorted(self._on_device, key=lambda memory: memory.read_at, reverse=True)
        taken = sum(memory.host_DF.nbytes for memory in resident)
        while resident and taken + wanted > self._room:
            oldest = resident.pop()
            oldest.device_DF = None
            self._on_device.discard(oldest)
            taken -= oldest.host_DF.nbytes


class SideMemories(Sequence[Tensor]):
    """One release's ΔW, D × F each, brought to the device as they are read."""

    def __init__(self, cache: MemoryCache, held: Sequence[HeldMemory]) -> None:
        self._cache, self._held = cache, tuple(held)

    def __len__(self) -> int:
        return len(self._held)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return SideMemories(self._cache, self._held[index])
        return self._cache.read(self._held[index])


def _free(device: torch.device) -> float:
    """Bytes that tensors may still take there."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(free + unused)
