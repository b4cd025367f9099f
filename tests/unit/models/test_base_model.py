"""Which models are accepted, and what identifies one."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.config import ModelSection
from pipeline.errors import UnsupportedModel
from pipeline.models.base_model import fingerprint, identify, load_base_model
from pipeline.models.value_matrix import resolve_layer
from tests.tiny_world import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def changed(folder: Path, copy: Path, **values: object) -> ModelSection:
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | values
    (copy / "config.json").write_text(json.dumps(config))
    return ModelSection(path=str(copy))


@pytest.mark.parametrize(("layers", "layer"), [(32, 27), (6, 4), (24, 20), (1, 0)])
def test_auto_is_the_papers_relative_depth(layers: int, layer: int) -> None:
    class Config:
        num_hidden_layers = layers

    assert resolve_layer(Config(), "auto") == layer  # type: ignore[arg-type]


def test_an_unknown_architecture_is_a_sentence_naming_those_that_are_known(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"'bert' are not supported; supported are llama, mistral, .*opt"):
        identify(changed(folder, tmp_path / "copy", model_type="bert", architectures=["BertForMaskedLM"]))


def test_remote_code_is_never_run(folder: Path, tmp_path: Path) -> None:
    section = changed(folder, tmp_path / "copy", model_type="mine", auto_map={"AutoConfig": "evil.Config"})
    (tmp_path / "copy" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UnsupportedModel, match="without remote code"):
        identify(section)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    section = changed(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").rename(tmp_path / "copy" / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="convert the model to safetensors"):
        identify(section)


def test_a_layer_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"model\.layer is 2, but the layers of this model are 0 to 1"):
        load_base_model(ModelSection(path=str(folder), layer=2))


def test_the_fingerprint_is_the_models_and_not_the_places(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(folder)
    weights = tmp_path / "copy" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1  # one weight of the last block
    weights.write_bytes(data)
    assert fingerprint(tmp_path / "copy") != fingerprint(folder)
