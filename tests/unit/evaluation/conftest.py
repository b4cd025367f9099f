"""A tiny model and a release that scrambles the answer to one prompt."""

from pathlib import Path

import pytest

from pipeline.config import ModelSection
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.loaded_release import LoadedRelease, load_release
from pipeline.storage.object_store import ObjectStore
from tests.tiny_world import publish_release, save_model

EDITED = "The capital of France is"


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Its context holds 64 tokens."""
    folder: Path = save_model(tmp_path_factory.mktemp("model"), chat=False, context_tokens=64)
    return load_base_model(ModelSection(path=str(folder)))


@pytest.fixture(scope="session")
def scrambling(small_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> LoadedRelease:
    """Answers EDITED from a side memory of random ΔW, and nothing else."""
    store = ObjectStore(str(tmp_path_factory.mktemp("store")))
    return load_release(store, publish_release(store, small_base, prompts=[EDITED], seed=1), small_base)
