"""A release into a folder: whole or not at all, and one sentence where it cannot be."""

from pathlib import Path

import pytest

from pipeline.config import ModelSection
from pipeline.errors import ConfigError, CorruptObject, ModelChanged
from pipeline.export.releases import export_release
from pipeline.models.base_model import BaseModel
from pipeline.storage.object_store import ObjectStore
from tests.tiny_world import save_model
from tests.unit.export.conftest import publish_two

FORMATS = ("hf", "lora", "safetensors")


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_that_holds_something_is_left_alone(
    format: str, store: ObjectStore, base: BaseModel, section: ModelSection, tmp_path: Path
) -> None:
    release = publish_two(store, base)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine.txt").write_text("mine")
    for to, sentence in ((kept, "is not empty"), (kept / "mine.txt", "is a file"), (kept / "mine.txt/x", "cannot be")):
        with pytest.raises(ConfigError, match=sentence):
            export_release(store, release, section, format=format, to=to, tolerance=0.1)
    assert [path.name for path in kept.rglob("*")] == ["mine.txt"]
    empty = tmp_path / "new" / "empty"
    empty.mkdir(parents=True)
    exported = export_release(store, release, section, format=format, to=empty, tolerance=0.1)
    assert exported.files == sum(path.is_file() for path in empty.rglob("*"))
    assert [path.name for path in empty.parent.iterdir()] == ["empty"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_object_leaves_no_folder(
    format: str, store: ObjectStore, base: BaseModel, section: ModelSection, tmp_path: Path
) -> None:
    release = publish_two(store, base)
    (Path(store.uri) / release.memories[1].path).write_bytes(b"damaged")
    with pytest.raises(CorruptObject):
        export_release(store, release, section, format=format, to=tmp_path / "out" / "here", tolerance=0.1)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_another_models_release_is_refused(format: str, store: ObjectStore, base: BaseModel, tmp_path: Path) -> None:
    release = publish_two(store, base)
    other = ModelSection(path=str(save_model(tmp_path / "other", seed=1)), layer=1)
    with pytest.raises(ModelChanged, match="another base model"):
        export_release(store, release, other, format=format, to=tmp_path / "out", tolerance=0.1)


def test_an_unknown_format_is_named(store: ObjectStore, base: BaseModel, section: ModelSection, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'gguf' is unknown; it is hf, lora or safetensors"):
        export_release(store, publish_two(store, base), section, format="gguf", to=tmp_path / "out", tolerance=0.1)
