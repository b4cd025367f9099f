"""One memory from trained shards to the matrix that is served, in process: merge, audit, polish."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from pipeline.config import Config, load_config
from pipeline.edits import Edit
from pipeline.errors import CorruptObject
from pipeline.models.base_model import BaseModel
from pipeline.models.suffix import load_suffix
from pipeline.storage import deltas
from pipeline.storage.deltas import decode_memory
from pipeline.storage.edit_log import LogEntry
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import ObjectRef
from pipeline.training import memory, stored_shards
from pipeline.training.activations import Activations
from pipeline.training.fit import Progress
from pipeline.training.memory import find_memory, merge_memory, polish_memory
from pipeline.training.planning import MemoryPlan, plan_round
from pipeline.training.shard import extract_shard, train_shard
from pipeline.training.stored_shards import StoredShards
from pipeline.wise.merge import METHODS

EDITS = [Edit(prompt=f"Who leads company {name}?", target=leader) for name, leader in ("Ap", "Bq", "Cr", "Ds")]
SETTINGS = (
    "shards.edits_per_shard=2",
    "training.prefixes=0",
    "training.max_steps=150",
    "training.learning_rate=0.005",
    "training.stop_loss=0.7",
    "merge.method=sum",
)


class World:
    """A memory of two trained shards in a store of its own."""

    def __init__(self, base: BaseModel, model_folder: Path, folder: Path) -> None:
        self.store = ObjectStore(str(folder))
        self.suffix = load_suffix(model_folder, base.layer, dtype="float32")
        now = datetime(2026, 1, 1, tzinfo=UTC)
        history = [
            LogEntry(seq=n, edit=edit, source="test", row=n, batch_id="b", ingested_at=now)
            for n, edit in enumerate(EDITS)
        ]
        (self.memory,) = plan_round(
            history, log_version=1, config=self.config(), fingerprint="f", layer=0, encoder="", fits=lambda edit: True
        ).memories
        self.activations: list[Activations] = []
        for shard in self.memory.shards:
            extracted = extract_shard(base, self.store, shard, prefix_pool=[], config=self.config())
            assert isinstance(extracted, Activations)
            self.activations.append(extracted)
        for shard, extracted in zip(self.memory.shards, self.activations, strict=True):
            list(
                train_shard(
                    self.suffix, self.store, self.memory, shard, extracted,
                    config=self.config(), fingerprint="f", layer=0,
                )
            )  # fmt: skip

    def config(self, *overrides: str) -> Config:
        return load_config(overrides=[*SETTINGS, *overrides])

    def polish(self, merged: ObjectRef, *overrides: str) -> tuple[Sequence[Progress], ObjectRef]:
        *progress, reference = polish_memory(
            self.suffix, self.store, self.memory, merged, self.activations, config=self.config(*overrides)
        )
        assert isinstance(reference, ObjectRef)
        return progress, reference  # type: ignore[return-value]

    def matrix(self, reference: ObjectRef) -> torch.Tensor:
        return torch.from_numpy(decode_memory(self.store.read(reference.path, sha256=reference.sha256)).matrix.copy())


@pytest.fixture(scope="module")
def world(base: BaseModel, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(base, model_folder, tmp_path_factory.mktemp("store"))


def test_merging_again_finds_the_same_memory(world: World) -> None:
    merged = merge_memory(world.store, world.memory, config=world.config())
    assert merge_memory(world.store, world.memory, config=world.config()) == merged
    (block,) = StoredShards(world.store, world.memory.shards).blocks()
    torch.testing.assert_close(world.matrix(merged), block.deltas_KRF[0] + block.deltas_KRF[1])  # what `sum` is


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_memory_merged_in_many_blocks_is_that_of_one(
    world: World, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deltas lie in one row group here, as older versions wrote them however large they were."""
    settings = (f"merge.method={method}", "merge.density=0.5")
    once = world.matrix(merge_memory(world.store, world.memory, config=world.config(*settings)))
    monkeypatch.setattr(deltas, "BLOCK_ENTRIES", 4 * once.shape[1])
    monkeypatch.setattr(memory, "_find", lambda store, path: None)
    monkeypatch.setattr(memory, "_path", lambda *_, **__: f"memories/{method}-in-blocks.parquet")
    in_blocks = merge_memory(world.store, world.memory, config=world.config(*settings, "training.threads=2"))
    torch.testing.assert_close(world.matrix(in_blocks), once, atol=1e-6, rtol=1e-5)


def test_a_delta_that_does_not_fit_its_mask_is_said_by_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = stored_shards.shard_mask
    monkeypatch.setattr(stored_shards, "shard_mask", lambda meta, **rows: ~mask(meta, **rows))
    with pytest.raises(CorruptObject, match=r"shards/.*/delta\.parquet does not fit its mask; remove it"):
        merge_memory(world.store, world.memory, config=world.config("merge.method=ram"))


def test_a_polish_holds_more_and_moves_only_what_the_shards_could(world: World) -> None:
    merged = merge_memory(world.store, world.memory, config=world.config())
    progress, polished = world.polish(merged, "merge.polish_steps=150")
    assert progress[0].step == 0
    assert progress[-1].holding >= progress[0].holding
    (block,) = StoredShards(world.store, world.memory.shards).blocks()
    trained_DF = block.trained_KRF.any(dim=0)
    moved_DF = world.matrix(polished) != world.matrix(merged)
    assert moved_DF.any()
    assert not (moved_DF & ~trained_DF).any()
    found = find_memory(world.store, world.memory, config=world.config("merge.polish_steps=150"))
    assert found == polished


def test_a_polish_that_makes_it_worse_is_not_taken(world: World) -> None:
    merged = merge_memory(world.store, world.memory, config=world.config())
    well, good = world.polish(merged, "merge.polish_steps=140")
    # A stop loss at the wordings' mean: some hold and some do not, so there is something to do and to lose.
    for steps in (1, 3):  # what the very last step does counts too
        badly = (f"merge.polish_steps={steps}", "training.learning_rate=100", f"training.stop_loss={well[-1].loss}")
        progress, kept = world.polish(good, *badly)
        assert progress[-1].holding < progress[0].holding
        assert torch.equal(world.matrix(kept), world.matrix(good))


def test_a_damaged_memory_is_said_by_name(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.config("merge.method=linear")
    merged = merge_memory(world.store, world.memory, config=config)
    monkeypatch.setattr(world.store, "read", lambda path, **_: b"not parquet")
    with pytest.raises(CorruptObject, match=f"{merged.path} in .* is damaged; remove it"):
        merge_memory(world.store, world.memory, config=config)


def test_an_unfinished_memory_is_not_found(world: World) -> None:
    other = MemoryPlan(digest="0" * 24, seed=0, shards=world.memory.shards, live=frozenset())
    assert find_memory(world.store, other, config=world.config()) is None


def test_a_published_memory_is_found_without_reading_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.config("merge.method=sum", "merge.polish_steps=0")
    merged = merge_memory(world.store, world.memory, config=config)
    with monkeypatch.context() as unreadable:
        unreadable.setattr(world.store, "read", lambda path, **_: pytest.fail(f"{path} was read"))
        published = {merged.path: merged}
        assert find_memory(world.store, world.memory, config=config, published=published) == merged
    elsewhere = {"memories/another.parquet": merged}
    assert find_memory(world.store, world.memory, config=config, published=elsewhere) == merged


def test_a_published_memory_that_is_gone_is_made_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.config("merge.method=sum", "merge.polish_steps=0")
    merged = merge_memory(world.store, world.memory, config=config)
    monkeypatch.setattr(world.store, "exists", lambda path: path != merged.path)
    assert find_memory(world.store, world.memory, config=config, published={merged.path: merged}) is None
