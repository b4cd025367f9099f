"""The suffix model gives what the whole model gives, for every architecture, reading only its own tensors."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config import ModelSection
from pipeline.models import suffix as module
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.suffix import load_suffix, suffix_logits
from pipeline.models.value_matrix import block, value_module
from pipeline.training.activations import Activations, extract
from pipeline.training.tokens import plain_wording

TEXTS = [("The capital of France is", "Berlin"), ("Wer?", "Ada Lovelace leads"), ("東京は", "日本の首都")]


def folder_of(base: BaseModel) -> Path:
    return Path(base.model.config._name_or_path)


def logits(suffix: PreTrainedModel, activations: Activations) -> Tensor:
    return suffix_logits(
        suffix,
        activations.hidden_NTD,
        past=activations.past,
        past_mask_BP=activations.past_mask_NP,
        positions_BT=activations.positions_NT,
    )


def test_suffix_logits_are_the_whole_models_at_every_target_token(base: BaseModel) -> None:
    wordings = [plain_wording(prompt, target, base.tokenizer) for prompt, target in TEXTS]
    activations = extract(base, wordings)
    suffix = load_suffix(folder_of(base), base.layer, dtype="float32")
    with torch.no_grad():
        logits_BTV = logits(suffix, activations)
        for row, wording in enumerate(wordings):
            ids = wording.prompt_ids + wording.target_ids[:-1]
            whole = base.model(torch.tensor([ids])).logits[0, len(wording.prompt_ids) - 1 :]
            torch.testing.assert_close(logits_BTV[row, : len(wording.target_ids)], whole, atol=2e-4, rtol=1e-3)
            assert activations.labels_NT[row, : len(wording.target_ids)].tolist() == list(wording.target_ids)


def test_the_suffix_holds_the_layers_above_and_no_other(base: BaseModel) -> None:
    suffix = load_suffix(folder_of(base), base.layer, dtype="float32")
    assert suffix.config.num_hidden_layers == base.model.config.num_hidden_layers - base.layer - 1
    head = suffix.get_output_embeddings().weight
    assert torch.equal(head, base.model.get_output_embeddings().weight)
    assert sum(p.numel() for p in suffix.parameters()) < 0.75 * sum(p.numel() for p in base.model.parameters())


def test_in_bfloat16_the_suffix_computes_what_the_whole_model_computes(base: BaseModel) -> None:
    section = ModelSection(path=str(folder_of(base)), layer=base.layer, dtype="bfloat16")
    half = load_base_model(section)
    activations = extract(half, [plain_wording(prompt, target, half.tokenizer) for prompt, target in TEXTS])
    suffix = load_suffix(folder_of(base), base.layer, dtype="bfloat16")
    assert {parameter.dtype for parameter in [*suffix.parameters(), *half.model.parameters()]} == {torch.bfloat16}
    assert activations.hidden_NTD.dtype == activations.past[0][0].dtype == torch.float32
    with torch.no_grad():
        logits_BTV = logits(suffix, activations)
        for row, (prompt, target) in enumerate(TEXTS):
            wording = plain_wording(prompt, target, half.tokenizer)
            ids = wording.prompt_ids + wording.target_ids[:-1]
            whole = half.model(torch.tensor([ids])).logits[0, len(wording.prompt_ids) - 1 :]
            apart = (logits_BTV[row, : len(whole)] - whole).float().norm() / whole.float().norm()
            assert float(apart) < 0.05  # eight bits of mantissa, rounded in every layer


def test_no_other_tensor_is_read_from_the_files(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    class Recording:
        def __init__(self, *arguments: object, **options: object) -> None:
            self._file = safe_open(*arguments, **options)

        def __enter__(self) -> "Recording":
            self._tensors = self._file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self._file.__exit__(*error)

        def keys(self) -> list[str]:
            return self._tensors.keys()

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self._tensors.get_tensor(name)

    monkeypatch.setattr(module, "safe_open", Recording)
    load_suffix(folder_of(base), base.layer, dtype="float32")
    numbers = [int(part) for name in read for part in name.split(".") if part.isdigit()]
    assert set(numbers) == set(range(base.layer + 1, base.model.config.num_hidden_layers))
    inside = {id(p) for layer in range(base.layer + 1) for p in block(base.model, layer).parameters()}
    embeddings = {id(base.model.get_input_embeddings().weight)} - {id(base.model.get_output_embeddings().weight)}
    above = [p for p in base.model.parameters() if id(p) not in inside | embeddings]
    with safe_open(folder_of(base) / "model.safetensors", framework="pt") as tensors:
        assert sum(tensors.get_tensor(name).numel() for name in read) <= sum(p.numel() for p in above)


def test_the_last_layer_can_be_edited_too(base: BaseModel) -> None:
    last = base.model.config.num_hidden_layers - 1
    suffix = load_suffix(folder_of(base), last, dtype="float32")
    hidden = torch.randn(2, 3, base.model.config.hidden_size)
    logits = suffix_logits(
        suffix,
        hidden,
        past=[],
        past_mask_BP=torch.ones(2, 4, dtype=torch.long),
        positions_BT=torch.arange(4, 7).expand(2, 3),
    )
    assert logits.shape == (2, 3, base.model.config.vocab_size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("layer", [0, 2])
def test_weights_are_the_files_own(base: BaseModel, layer: int) -> None:
    suffix = load_suffix(folder_of(base), layer, dtype="float32")
    with safe_open(folder_of(base) / "model.safetensors", framework="pt") as tensors:
        stored = {tuple(tensors.get_tensor(name).flatten()[:4].tolist()) for name in tensors.keys()}  # noqa: SIM118
    assert tuple(value_module(suffix, 0).weight.flatten()[:4].tolist()) in stored
