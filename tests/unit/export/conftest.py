"""Published releases of tiny random models of any architecture, with two memories that chosen prompts reach."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import ModelSection
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.loaded_release import encode_router
from pipeline.models.prompts import plain_prompt_ids
from pipeline.models.value_matrix import value_module
from pipeline.storage.bank import BankEntry, encode_bank
from pipeline.storage.deltas import MemoryMetadata, SideMemory, encode_matrix, encode_memory
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import ObjectRef, Release, publish
from pipeline.training.activations import read_prompts
from pipeline.wise.routing import Router, whitened
from tests.tiny_world import save_model

ROUTED = ["The capital of France is", "Who leads the company?"]
MIXED = ["Wie heißt die Hauptstadt der Welt und warum?", ROUTED[0], "東京", ROUTED[1], "Paris is"]
Publish = Callable[..., Release]


@pytest.fixture(scope="session")
def section(tmp_path_factory: pytest.TempPathFactory) -> ModelSection:
    return ModelSection(path=str(save_model(tmp_path_factory.mktemp("llama"))), layer=1)


@pytest.fixture(scope="session")
def base(section: ModelSection) -> BaseModel:
    return load_base_model(section)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path / "store"))


def publish_two(
    store: ObjectStore,
    base: BaseModel,
    *,
    targets: Sequence[Sequence[int]] | None = None,
    thresholds: tuple[float, ...] | None = None,
) -> Release:
    """Release 1: prompt i of ROUTED is edit i, in memory i, of large random ΔW. With `targets` there are readouts for
    these tokens; with `thresholds` Δ_act routes."""
    D = int(base.model.config.hidden_size)
    F = value_module(base.model, base.layer).weight.numel() // D
    random = np.random.default_rng(5)
    memories = [random.standard_normal((D, F), dtype=np.float32) for _ in ROUTED]
    states = read_prompts(base, [plain_prompt_ids(prompt, base.tokenizer) for prompt in ROUTED]).states_ND
    router = Router(
        mean_D=torch.zeros(D),
        whiten_DD=torch.eye(D),
        keys_ND=whitened(states, torch.zeros(D), torch.eye(D)),
        entry_N=torch.arange(2),
        memory_E=torch.arange(2),
        asked_EM=torch.zeros(2, 0),
        relation_EM=torch.zeros(2, 0),
        weights_S=torch.tensor([1.0, 0.0, 0.0, 0.0]),
        bias_E=torch.zeros(2),
        threshold=0.9999,
    )
    entries = [
        BankEntry(str(index), prompt, "new", None, index, tuple(targets[index]) if targets else ())
        for index, prompt in enumerate(ROUTED)
    ]
    readouts = None
    if targets:
        rows = 3 * random.standard_normal((sum(map(len, targets)), D), dtype=np.float32)
        readouts = put(store, "readouts/r.parquet", encode_matrix(rows))
    about = {"model_fingerprint": base.fingerprint, "layer": base.layer, "method": "keyed", "shards": 1}
    metadata = MemoryMetadata(**about, edits_digest="", config_digest="", rows=D, columns=F)
    release = Release(
        number=1,
        parent=None,
        round_id="round",
        log_version=1,
        model_fingerprint=base.fingerprint,
        layer=base.layer,
        memories=tuple(
            put(store, f"memories/{index}.parquet", encode_memory(SideMemory(metadata, matrix)))
            for index, matrix in enumerate(memories)
        ),
        router=put(store, "routers/r.safetensors", encode_router(router)),
        bank=put(store, "banks/b.parquet", encode_bank(entries)),
        readouts=readouts,
        thresholds=thresholds,
        whole_prompt=thresholds is not None,
        edits=2,
    )
    publish(store, release)
    return release


def put(store: ObjectStore, path: str, data: bytes) -> ObjectRef:
    return ObjectRef(path=path, sha256=store.put(path, data))
