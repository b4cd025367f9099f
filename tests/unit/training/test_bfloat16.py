"""A bfloat16 model from the log to its answers, in process: it computes in bfloat16, ΔW is float32 throughout."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from pipeline.config import load_config
from pipeline.edits import Edit
from pipeline.models.base_model import load_base_model
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import load_release
from pipeline.models.prompts import plain_prompt_ids
from pipeline.models.suffix import load_suffix
from pipeline.storage.deltas import StoredDelta, decode_memory
from pipeline.storage.edit_log import LogEntry
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import ObjectRef
from pipeline.training.activations import Activations
from pipeline.training.candidate import assemble, route
from pipeline.training.fit import Progress
from pipeline.training.memory import merge_memory, polish_memory
from pipeline.training.planning import plan_round
from pipeline.training.shard import extract_shard, train_shard
from pipeline.training.shard_files import delta_path

EDITS = [Edit(prompt=f"Who leads company {name}?", target=leader) for name, leader in (("Ap", "Bq"), ("Cr", "Ds"))]
TEXTS = [f"The {colour} {thing} is here" for colour in ("red", "old", "new") for thing in ("house", "tree", "boat")]


@pytest.mark.parametrize("addressing", ["matched", "own"])
def test_edits_trained_in_bfloat16_are_answered_in_bfloat16(
    model_folder: Path, tmp_path: Path, addressing: str
) -> None:
    config = load_config(
        overrides=[
            f"model.path={model_folder}",
            "model.layer=0",
            "model.dtype=bfloat16",
            "shards.edits_per_shard=1",
            "training.prefixes=0",
            "training.learning_rate=0.005",
            "training.stop_loss=0.3",
            "training.max_steps=1000",
            f"router.addressing={addressing}",
            "router.signals=[keys, subject]",
        ]
    )
    base, store = load_base_model(config.model), ObjectStore(str(tmp_path))
    suffix = load_suffix(model_folder, base.layer, dtype=config.model.dtype)
    assert base.model.dtype == suffix.dtype == torch.bfloat16
    now = datetime(2026, 1, 1, tzinfo=UTC)
    history = [
        LogEntry(seq=n, edit=edit, source="test", row=n, batch_id="b", ingested_at=now) for n, edit in enumerate(EDITS)
    ]
    plan = plan_round(
        history,
        log_version=1,
        config=config,
        fingerprint=base.fingerprint,
        layer=base.layer,
        encoder="",
        fits=lambda edit: True,
    )
    (memory,) = plan.memories
    extracted = [extract_shard(base, store, shard, prefix_pool=[], config=config) for shard in memory.shards]
    activations = [one for one in extracted if isinstance(one, Activations)]
    for shard, of_shard in zip(memory.shards, activations, strict=True):
        *_, last = train_shard(
            suffix, store, memory, shard, of_shard, config=config, fingerprint=base.fingerprint, layer=base.layer
        )
        assert isinstance(last, Progress) and last.holding == last.wordings
        with store.open(delta_path(shard.digest)) as file:
            assert StoredDelta(file).metadata.dtype == "float32"
    merged = merge_memory(store, memory, config=config)
    *_, polished = polish_memory(suffix, store, memory, merged, activations, config=config)
    assert isinstance(polished, ObjectRef)
    assert decode_memory(store.read(polished.path)).matrix.dtype == "float32"
    fitted = route(base, store, plan, None, texts=TEXTS, config=config)
    release = assemble(base, store, plan, [polished], fitted, texts=TEXTS, config=config, parent=None).release

    loaded = load_release(store, release, base)
    assert loaded.memories[0].dtype == torch.bfloat16
    requests = [
        GenerationRequest(prompt_ids=plain_prompt_ids(text, base.tokenizer), text=text, max_new_tokens=8)
        for text in [*(edit.prompt for edit in EDITS), *TEXTS]
    ]
    unedited, _ = generate(base, None, requests)
    answers, decisions = generate(base, loaded, requests)
    assert answers[:2] == [edit.target for edit in EDITS] != unedited[:2]
    assert answers[2:] == unedited[2:]
    assert [decision.memory for decision in decisions] == [0, 0, *[None for _ in TEXTS]]
