"""One release into one folder, in one of the formats."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.config import ModelSection
from pipeline.errors import ConfigError
from pipeline.export.folder import whole_folder
from pipeline.export.hf import write_hf
from pipeline.export.lora import write_lora
from pipeline.export.tensors import write_tensors
from pipeline.models.base_model import identify
from pipeline.models.loaded_release import check_made_for
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import Release

Format = Literal["hf", "lora", "safetensors"]


@dataclass(frozen=True)
class Exported:
    """`details`: what the format has to say of itself."""

    files: int
    bytes: int
    details: dict[str, Any]


def export_release(
    store: ObjectStore, release: Release, section: ModelSection, *, format: str, to: Path, tolerance: float
) -> Exported:
    """Write the release to the folder `to`, whole or not at all.

    Raises ConfigError about format or folder, UnsupportedModel and ModelChanged about the base model, StoreError about
    the release's objects.
    """
    if format not in get_args(Format):
        raise ConfigError(f"--format {format!r} is unknown; it is {', '.join(get_args(Format)[:-1])} or safetensors.")
    identity = identify(section)
    check_made_for(release, identity.fingerprint, identity.layer)
    with whole_folder(to) as folder:
        match format:
            case "hf":
                details = write_hf(folder, store, release, section, identity)
            case "lora":
                details = write_lora(folder, store, release, section, tolerance=tolerance)
            case _:
                details = write_tensors(folder, store, release, section)
        files = [path for path in folder.rglob("*") if path.is_file()]
        return Exported(files=len(files), bytes=sum(path.stat().st_size for path in files), details=details)
