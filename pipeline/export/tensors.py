"""Format `safetensors`: memories, router, bank and readouts as plain files, for runtimes that are not this one."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.config import ModelSection
from pipeline.models.base_model import load_config, model_folder
from pipeline.models.loaded_release import decode_router, encode_router
from pipeline.models.value_matrix import value_path
from pipeline.storage.bank import decode_bank
from pipeline.storage.deltas import decode_matrix, decode_memory
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import Release

README = (Path(__file__).parent / "tensors_readme.md").read_text(encoding="utf-8")


def write_tensors(folder: Path, store: ObjectStore, release: Release, section: ModelSection) -> dict[str, Any]:
    (folder / "memories").mkdir()
    for index, reference in enumerate(release.memories):
        delta_DF = torch.tensor(decode_memory(store.read(reference.path, sha256=reference.sha256)).matrix)
        save_file({"delta": delta_DF}, folder / "memories" / f"memory-{index}.safetensors")
    router = decode_router(store.read(release.router.path, sha256=release.router.sha256), device=torch.device("cpu"))
    (folder / "router.safetensors").write_bytes(encode_router(router))
    entries = decode_bank(store.read(release.bank.path, sha256=release.bank.sha256))
    lines = (json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in entries)
    (folder / "bank.jsonl").write_text("".join(lines), encoding="utf-8")
    if release.readouts is not None:
        matrix, _ = decode_matrix(store.read(release.readouts.path, sha256=release.readouts.sha256))
        lengths = torch.tensor([len(entry.target_ids) for entry in entries], dtype=torch.long)
        first = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        save_file({"readouts": torch.tensor(matrix), "first": first}, folder / "readouts.safetensors")
    about = {
        "format_version": 1,
        "release": release.number,
        "model_fingerprint": release.model_fingerprint,
        "layer": release.layer,
        "module": value_path(load_config(model_folder(section)), release.layer),
        "memories": len(release.memories),
        "edits": len(entries),
        "routing": "router" if release.thresholds is None else "activation",
        "thresholds": release.thresholds,
        "addressing": "own" if release.readouts is None else "matched",
        "whole_prompt": release.whole_prompt,
        "threshold": router.threshold,
        "encoder": router.encoder or None,
    }
    (folder / "release.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(README, encoding="utf-8")
    return {"memories": len(release.memories)}
