"""What rounds over the tiny model are given here: shards that all train to their last step, so that there is time."""

import json
from pathlib import Path

from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import read_release, release_path
from tests.tiny_world import save_model

LETTERS = "abcdefghijkl"
SHARDS = 6
SETTINGS = [
    "model.layer=0",
    "shards.edits_per_shard=2",
    "shards.shards_per_memory=2",
    "shards.density=0.5",
    "training.max_steps=400",
    "training.stop_loss=1e-6",  # never reached
    "training.prefixes=1",
    "merge.polish_steps=20",
    "router.signals=[keys, subject]",
    "round.min_reliability=0",
    "round.min_generalization=0",
    "round.min_locality=0",
]


def settings(folder: Path, *, store: str) -> list[str]:
    return [f"model.path={folder / 'model'}", f"store.uri={folder / store}", *SETTINGS]


def write_world(folder: Path) -> Path:
    """The model, and a file of edits; returns the file."""
    save_model(folder / "model", chat=False)
    rows = [{"prompt": f"Who leads {name}?", "target": "new", "subject": f"company {name}"} for name in LETTERS]
    file = folder / "edits.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def release_bytes(store: Path) -> dict[str, bytes]:
    """Of release 1: manifest and everything it names."""
    objects = ObjectStore(str(store))
    paths = [release_path(1), *(item.path for item in read_release(objects, 1).objects)]
    return {path: objects.read(path) for path in paths}
