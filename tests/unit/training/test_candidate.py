"""The candidate of a round: who is in the bank, what the memories say to each edit, and what an older release saves."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import Config, load_config
from pipeline.edits import Edit
from pipeline.models import encoder as encoder_module
from pipeline.models.base_model import BaseModel
from pipeline.models.encoder import Encoder
from pipeline.storage.bank import decode_bank
from pipeline.storage.deltas import MemoryMetadata, SideMemory, decode_matrix, encode_memory
from pipeline.storage.edit_log import LogEntry
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import ObjectRef, Release
from pipeline.training.activations import extract
from pipeline.training.candidate import assemble, route
from pipeline.training.planning import Plan, plan_round
from pipeline.training.shard import extract_shard
from pipeline.training.tokens import wordings
from tests.tiny_world import save_encoder

EDITS = [Edit(prompt=f"Who leads {name}?", target=f"new {name}", subject=name) for name in ("Ada", "Bob", "Cleo")]
RETRACTED = Edit(op="retract", prompt="Who leads Bob?", subject="Bob")
TEXTS = ["The red house is here.", "A boat is old."]


class World:
    """Two memories, of two edits and of one, with random matrices: nothing here depends on what was trained."""

    def __init__(self, base: BaseModel, folder: Path) -> None:
        self.base, self.store, self.folder = base, ObjectStore(str(folder)), folder
        self.matrices = [self._matrix(seed) for seed in (1, 2)]
        self.memories = []
        for index, matrix in enumerate(self.matrices):
            metadata = MemoryMetadata(
                model_fingerprint="f", layer=0, method="sum", shards=2, edits_digest="", config_digest="",
                rows=matrix.shape[0], columns=matrix.shape[1],
            )  # fmt: skip
            path = f"memories/{index}.parquet"
            sha256 = self.store.put(path, encode_memory(SideMemory(metadata, matrix)))
            self.memories.append(ObjectRef(path=path, sha256=sha256))

    def plan(self, *log: Edit, encoder: str = "") -> Plan:
        now = datetime(2026, 1, 1, tzinfo=UTC)
        history = [
            LogEntry(seq=n, edit=edit, source="test", row=n, batch_id="b", ingested_at=now)
            for n, edit in enumerate(log)
        ]
        plan = plan_round(
            history, log_version=1, config=config(), fingerprint="f", layer=0, encoder=encoder, fits=lambda edit: True
        )
        for memory in plan.memories:
            for shard in memory.shards:
                extract_shard(self.base, self.store, shard, prefix_pool=TEXTS, config=config())
        return plan

    def assemble(self, plan: Plan, *overrides: str, standing: Release | None = None) -> Release:
        of_test = config(*overrides)
        fitted = route(self.base, self.store, plan, standing, texts=TEXTS, config=of_test)
        memories = self.memories[: len(plan.memories)]
        return assemble(self.base, self.store, plan, memories, fitted, texts=TEXTS, config=of_test, parent=None).release

    def _matrix(self, seed: int) -> np.ndarray:
        shape = self.base.model.config.hidden_size, self.base.model.config.intermediate_size
        return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def config(*overrides: str) -> Config:
    signals = "router.signals=[keys, subject]"
    return load_config(overrides=["shards.edits_per_shard=1", "training.prefixes=1", signals, *overrides])


@pytest.fixture
def world(base: BaseModel, tmp_path: Path) -> World:
    return World(base, tmp_path)


@pytest.fixture
def encoder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    encoder = Encoder(save_encoder(tmp_path_factory.mktemp("encoder")))
    monkeypatch.setattr(encoder_module, "shared_encoder", lambda: encoder)
    return encoder


def test_readouts_are_what_each_edits_memory_says_at_its_own_keys(world: World) -> None:
    release = world.assemble(world.plan(*EDITS))
    assert release.readouts is not None
    stored, _ = decode_matrix(world.store.read(release.readouts.path, sha256=release.readouts.sha256))
    wanted = []
    for edit, memory in zip(sorted(EDITS, key=lambda edit: edit.subject == "Cleo"), (0, 0, 1), strict=True):
        (bare, *_) = wordings(edit, world.base.tokenizer, prefixes=[], max_tokens=256)
        wanted.append(extract(world.base, [bare]).target_keys_MF().numpy() @ world.matrices[memory].T)
    np.testing.assert_allclose(stored, np.concatenate(wanted), atol=1e-3, rtol=1e-3)


def test_an_edit_that_left_a_sealed_memory_is_not_in_the_bank_and_its_neighbours_are(world: World) -> None:
    release = world.assemble(world.plan(*EDITS, RETRACTED))
    bank = decode_bank(world.store.read(release.bank.path, sha256=release.bank.sha256))
    assert [(entry.subject, entry.memory) for entry in bank] == [("Ada", 0), ("Cleo", 1)]
    assert release.edits == 2


def test_without_matched_addressing_there_are_no_readouts(world: World) -> None:
    assert world.assemble(world.plan(*EDITS), "router.addressing=own").readouts is None


def test_a_text_that_the_standing_release_knows_gives_the_same_bytes(world: World, encoder: Encoder) -> None:
    both = ("router.signals=[keys, subject, encoder, relation]",)
    standing = world.assemble(world.plan(*EDITS[:2], encoder=encoder.fingerprint), *both)
    plan = world.plan(*EDITS, encoder=encoder.fingerprint)
    encoder._remembered.clear()
    afresh = world.assemble(plan, *both)
    encoder._remembered.clear()
    assert world.assemble(plan, *both, standing=standing).router == afresh.router


def test_a_damaged_standing_release_costs_time_and_nothing_else(world: World, encoder: Encoder) -> None:
    both = ("router.signals=[keys, subject, encoder, relation]",)
    plan = world.plan(*EDITS, encoder=encoder.fingerprint)
    whole = world.assemble(plan, *both)
    world.folder.joinpath(whole.bank.path).unlink()
    assert world.assemble(plan, *both, standing=whole).router == whole.router
