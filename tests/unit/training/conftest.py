"""One tiny Llama for all training tests."""

from pathlib import Path

import pytest

from pipeline.config import ModelSection
from pipeline.models.base_model import BaseModel, load_base_model
from tests.tiny_world import save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def base(model_folder: Path) -> BaseModel:
    return load_base_model(ModelSection(path=str(model_folder), layer=0))
