"""A release in memory: side memories, router and bank, verified against its manifest."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline.errors import CorruptObject, ModelChanged
from pipeline.models.base_model import BaseModel, Identity
from pipeline.models.encoder import Encoder, demanded_encoder
from pipeline.models.readings import TextReader
from pipeline.models.side_memories import MemoryCache
from pipeline.storage.bank import BankEntry, decode_bank
from pipeline.storage.deltas import decode_matrix
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import OfModel, Release, head
from pipeline.wise.routing import Router


@dataclass(frozen=True)
class LoadedRelease:
    """What a request holds from its first token to its last. `number` is None for a candidate that is not published."""

    number: int | None
    memories: Sequence[Tensor]  # ΔW, D × F each; brought to the device when they are read
    router: Router
    entries: tuple[BankEntry, ...] = field(repr=False)
    # Per entry ΔW·A_t, T × D, on the host: what its memory says at the edit's own keys. None: read at the prompt's own.
    readouts: tuple[Tensor, ...] | None = field(default=None, repr=False)
    thresholds: tuple[float, ...] | None = None  # ε of each memory: activation routing. None: the router decides
    whole_prompt: bool = False  # memories act on every token of a routed prompt, not on its last one alone

    failed: frozenset[str] = frozenset()  # ids of living edits that could not be taught live
    log_version: int = 0  # what it heard of the log

    encoder: Encoder | None = field(default=None, repr=False)  # the one the router was made with

    @cached_property
    def reader(self) -> TextReader:
        return TextReader(self.entries, self.encoder)

    def prepare(self) -> None:
        """Builds now what the first prompt would otherwise wait for, and all others with it."""
        _ = self.reader, self.entry_of

    @cached_property
    def entry_of(self) -> dict[str, BankEntry]:
        return {entry.edit_id: entry for entry in self.entries}


def load_release(
    store: ObjectStore, release: Release, base: BaseModel, *, memories: MemoryCache | None = None
) -> LoadedRelease:
    """The release, its router on the device of layer L. `memories`: what releases loaded before may share with it.

    Raises ModelChanged when it was made for another base model or layer, CorruptObject when an object differs from the
    manifest's checksum, ConfigError when its router needs a sentence encoder that is not the one here.
    """
    check_made_for(release, base.fingerprint, base.layer)
    cache = memories or MemoryCache(base)
    router = decode_router(store.read(release.router.path, sha256=release.router.sha256), device=base.layer_device)
    entries = decode_bank(store.read(release.bank.path, sha256=release.bank.sha256))
    readouts = None
    if release.readouts is not None:
        matrix, _ = decode_matrix(store.read(release.readouts.path, sha256=release.readouts.sha256))
        all_of_them = torch.tensor(matrix, dtype=base.model.dtype)
        readouts = tuple(torch.split(all_of_them, [len(entry.target_ids) for entry in entries]))
    return LoadedRelease(
        number=release.number,
        memories=cache.hold(store, release.memories),
        router=router,
        entries=tuple(entries),
        readouts=readouts,
        thresholds=release.thresholds,
        whole_prompt=release.whole_prompt,
        failed=frozenset(release.live.failed if release.live else ()),
        log_version=release.log_version,
        encoder=demanded_encoder(router.encoder) if router.encoder else None,
    )


def newest_for(store: ObjectStore, model: BaseModel | Identity) -> Release | None:
    """The newest release for this base model. Raises ModelChanged where all there are are for others."""
    newest = head(store, OfModel(model.fingerprint, model.layer))
    if newest is None and (others := head(store)):
        check_made_for(others, model.fingerprint, model.layer)
    return newest


def check_made_for(release: Release, fingerprint: str, layer: int) -> None:
    """Raises ModelChanged when the release was made for another base model or layer."""
    if (release.model_fingerprint, release.layer) != (fingerprint, layer):
        raise ModelChanged(
            f"Release {release.number} was made for another base model (fingerprint {release.model_fingerprint}, layer "
            f"{release.layer}; this one is {fingerprint}, layer {layer}); run a round with this model first."
        )


def encode_router(router: Router) -> bytes:
    """Safetensors; scalars and the encoder's name are stored as tensors too."""
    tensors = {}
    for item in fields(Router):
        value = getattr(router, item.name)
        if isinstance(value, str):
            value = torch.tensor(list(value.encode()), dtype=torch.uint8)
        tensors[item.name] = (
            value.contiguous() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        )
    data: bytes = save(tensors)
    return data


def decode_router(data: bytes, *, device: torch.device) -> Router:
    """Raises CorruptObject when the bytes are not a router."""
    try:
        tensors = load(data)
        if "bias" in tensors:
            tensors = _from_two_signals(tensors)
        if "keys_floor" in tensors:
            raise ValueError("it scales cosines as no later version does")
        values: dict[str, Any] = {
            item.name: bytes(tensors[item.name].tolist()).decode()
            if item.type is str
            else float(tensors[item.name])
            if item.type is float
            else tensors[item.name].to(device)
            for item in fields(Router)
        }
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptObject(f"The release's router cannot be read ({error}); roll back to an older release.") from None
    return Router(**values)


def _from_two_signals(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A router as releases stored it before there was an encoder: weights of the plain cosine and of the subject, and
    one bias."""
    keys, subject = tensors["weights_S"].tolist()
    entries = len(tensors["memory_E"])
    nothing_E0 = torch.zeros(entries, 0, dtype=torch.float16)
    return tensors | {
        "asked_EM": nothing_E0,
        "relation_EM": nothing_E0,
        "weights_S": torch.tensor([keys, subject, 0.0, 0.0]),
        "bias_E": torch.full((entries,), float(tensors["bias"])),
        "encoder": torch.zeros(0, dtype=torch.uint8),
    }
