"""A side memory as a PEFT adapter: of the least rank that is good enough, and read as PEFT's format says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.config import ModelSection
from pipeline.errors import ConfigError
from pipeline.export.lora import low_rank
from pipeline.export.releases import export_release
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.value_matrix import value_module
from pipeline.storage.deltas import decode_memory
from pipeline.storage.object_store import ObjectStore
from tests.unit.export.conftest import publish_two
from tests.unit.models.conftest import save_architecture


@given(seed=st.integers(0, 2**16), rank=st.integers(1, 6), tolerance=st.floats(0.001, 0.9))
def test_the_rank_is_the_least_within_the_tolerance(seed: int, rank: int, tolerance: float) -> None:
    random = np.random.default_rng(seed)
    delta = (random.standard_normal((6, rank)) @ random.standard_normal((rank, 9))).astype(np.float32)
    up, down, error = low_rank(torch.tensor(delta), tolerance=tolerance)
    missed = np.linalg.norm(delta - (up @ down).numpy()) / np.linalg.norm(delta)
    assert missed == pytest.approx(error, abs=1e-5)
    assert error <= tolerance
    values = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    if down.shape[0] > 1:
        assert np.linalg.norm(values[down.shape[0] - 1 :]) / np.linalg.norm(values) > tolerance


def test_nothing_is_a_rank_of_one() -> None:
    up, down, error = low_rank(torch.zeros(4, 5), tolerance=0.0)
    assert (up.shape, down.shape, error) == ((4, 1), (1, 5), 0.0)
    assert not (up @ down).any()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_an_adapter_is_the_side_memory_at_every_token(model_type: str, store: ObjectStore, tmp_path: Path) -> None:
    """Oracle: ΔW added to W_v. The adapter goes on by PEFT where it is installed, else by the format's definition:
    the module's output gains alpha / r · B (A x)."""
    section = ModelSection(path=str(save_architecture(tmp_path / "base", model_type)), layer=1)
    base = load_base_model(section)
    release = publish_two(store, base)
    exported = export_release(store, release, section, format="lora", to=tmp_path / "lora", tolerance=1e-6)
    assert [one["name"] for one in exported.details["adapters"]] == ["memory-0", "memory-1"]
    ids = torch.tensor([base.tokenizer("Who leads the company?")["input_ids"]])
    by_format = logits_with_adapter(base, tmp_path / "lora" / "memory-1", ids)

    delta = torch.tensor(decode_memory(store.read(release.memories[1].path)).matrix)
    weight = value_module(base.model, base.layer).weight
    weight.data += delta.T if model_type == "gpt2" else delta
    with torch.no_grad():
        merged = base.model(ids).logits
    torch.testing.assert_close(by_format, merged, rtol=1e-3, atol=1e-3)


def logits_with_adapter(base: BaseModel, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    try:
        from peft import PeftModel
    except ImportError:
        config = json.loads((folder / "adapter_config.json").read_text())
        weights = load_file(folder / "adapter_model.safetensors")
        (module,) = config["target_modules"]
        down, up = (weights[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")

        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return output + config["lora_alpha"] / config["r"] * (inputs[0] @ down.T) @ up.T

        handle = base.model.get_submodule(module).register_forward_hook(add)
        with torch.no_grad():
            logits: torch.Tensor = base.model(ids).logits
        handle.remove()
        return logits
    adapted = PeftModel.from_pretrained(base.model, folder)
    with torch.no_grad():
        logits = adapted(ids).logits
    adapted.unload()
    return logits


def test_a_release_without_a_memory_is_refused(
    store: ObjectStore, base: BaseModel, section: ModelSection, tmp_path: Path
) -> None:
    empty = publish_two(store, base).model_copy(update={"memories": ()})
    with pytest.raises(ConfigError, match="no side memory"):
        export_release(store, empty, section, format="lora", to=tmp_path / "lora", tolerance=0.1)
    assert not (tmp_path / "lora").exists()
