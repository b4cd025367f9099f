"""Where layers lie: which devices are asked for, and that a model whose layers accelerate moves answers as before."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.errors import UnsupportedModel
from pipeline.models import placement as module
from pipeline.models.base_model import BaseModel
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.placement import execution_device, placement
from pipeline.models.prompts import plain_prompt_ids
from pipeline.training.activations import extract
from pipeline.training.tokens import plain_wording

GIB = 2**30
PROMPTS = ["The capital of France is", "Who leads the company?", "東京"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with so many GPUs of 80 GiB, with or without accelerate."""

    def pretend(gpus: int, *, accelerate: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * GIB, 80 * GIB))
        monkeypatch.setattr(module, "find_spec", lambda name: object() if accelerate else None)

    return pretend


def test_without_a_gpu_nothing_is_placed(machine: Callable[..., None]) -> None:
    machine(0)
    assert placement("auto") == placement("one") == placement("spread") == {}


def test_one_gpu_takes_it_all(machine: Callable[..., None]) -> None:
    for gpus, wanted in ((1, "auto"), (1, "one"), (8, "one")):
        machine(gpus)
        assert placement(wanted) == {"device_map": {"": 0}}  # type: ignore[arg-type]
        machine(gpus, accelerate=False)
        assert placement(wanted) == {}  # type: ignore[arg-type]


def test_several_gpus_leave_room_beside_the_weights(machine: Callable[..., None]) -> None:
    machine(2)
    first, evenly = placement("auto"), placement("spread")
    assert (first["device_map"], evenly["device_map"]) == ("sequential", "balanced")
    assert first["max_memory"] == evenly["max_memory"] == {0: 64 * GIB, 1: 64 * GIB}


def test_accelerate_is_demanded_only_where_it_is_asked_for(machine: Callable[..., None]) -> None:
    machine(2, accelerate=False)
    assert placement("auto") == {}
    with pytest.raises(UnsupportedModel, match=r"pip install \"wiseline\[multi-gpu\]\""):
        placement("spread")


def test_a_module_computes_where_its_hook_says() -> None:
    plain = nn.Linear(2, 2)
    assert execution_device(plain) == torch.device("cpu")
    kept_on_the_host = nn.Linear(2, 2, device="meta")
    kept_on_the_host._hf_hook = type("Hook", (), {"execution_device": "cpu"})()
    assert execution_device(kept_on_the_host) == torch.device("cpu")


@pytest.fixture
def moved(base: BaseModel, tmp_path: Path) -> BaseModel:
    """The same model, its first and last layers on disk until accelerate brings them in: what a machine without GPUs
    can show of a model whose layers are moved about."""
    pytest.importorskip("accelerate")
    blocks = "model.layers" if base.model.config.model_type == "llama" else "model.decoder.layers"
    layers = {f"{blocks}.{index}": "disk" if index in (1, 3) else "cpu" for index in range(4)}
    leaves = (name for name, child in base.model.named_modules() if name and not list(child.children()))
    rest = {name: "cpu" for name in leaves if not name.startswith(blocks)}
    model = AutoModelForCausalLM.from_pretrained(
        base.model.config._name_or_path, dtype=torch.float32, device_map=rest | layers, offload_folder=tmp_path
    )
    return replace(base, model=model.requires_grad_(False).eval())


BOTH = pytest.mark.parametrize("base", ["llama", "opt"], indirect=True)  # OPT's FFN sees one long row of tokens


@BOTH
def test_a_model_whose_layers_are_moved_about_answers_as_before(
    base: BaseModel, moved: BaseModel, route_to: Callable[[Sequence[str]], LoadedRelease]
) -> None:
    release = route_to(PROMPTS[:2])
    requests = [
        GenerationRequest(prompt_ids=plain_prompt_ids(prompt, base.tokenizer), text=prompt, max_new_tokens=8)
        for prompt in PROMPTS
    ]
    assert moved.layer_device == base.layer_device
    answers, decisions = generate(base, release, requests)
    assert generate(moved, release, requests) == (answers, decisions)
    assert answers != generate(base, None, requests)[0]


@BOTH
def test_what_is_extracted_from_it_is_the_same(base: BaseModel, moved: BaseModel) -> None:
    asked = [plain_wording(prompt, "Ada Lovelace", base.tokenizer) for prompt in PROMPTS]
    here, there = extract(base, asked), extract(moved, asked)
    for name in ("states_ND", "keys_NTF", "hidden_NTD"):
        torch.testing.assert_close(getattr(there, name), getattr(here, name))
