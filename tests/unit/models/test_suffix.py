"""The suffix model gives what the whole model gives, for every architecture, reading only its own tensors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config import ModelSection
from pipeline.models import suffix as module
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.prompts import plain_prompt_ids
from pipeline.models.suffix import load_suffix, suffix_logits
from pipeline.models.value_matrix import block, value_module
from pipeline.training.activations import Activations, extract
from pipeline.training.tokens import Wording, plain_wording
from tests.unit.models.conftest import save_architecture

TEXTS = [("The capital of France is", "Berlin"), ("Wer?", "Ada Lovelace leads"), ("東京は", "日本の首都")]
PREFIXES = ["Because", "The weather was fine and"]


def behind(prefix: str, prompt: str, target: str, base: BaseModel) -> Wording:
    shared = len(plain_prompt_ids(prefix, base.tokenizer))
    return replace(plain_wording(f"{prefix} {prompt}", target, base.tokenizer), shared=shared)


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
    """Also behind prefixes that several wordings share, which are read once."""
    wordings = [plain_wording(prompt, target, base.tokenizer) for prompt, target in TEXTS]
    wordings += [behind(prefix, *text, base) for prefix in PREFIXES for text in TEXTS]
    assert all(wording.shared for wording in wordings[len(TEXTS) :])
    activations = extract(base, wordings)
    alone = [extract(base, [replace(wording, shared=0)]) for wording in wordings]
    suffix = load_suffix(folder_of(base), base.layer, dtype="float32")
    with torch.no_grad():
        logits_BTV = logits(suffix, activations)
        for row, one in enumerate(alone):
            T = one.keys_NTF.shape[1]
            torch.testing.assert_close(activations.keys_NTF[row, :T], one.keys_NTF[0], atol=2e-4, rtol=1e-3)
            torch.testing.assert_close(activations.states_ND[row], one.states_ND[0], atol=2e-4, rtol=1e-3)
        for row, wording in enumerate(wordings):
            ids = wording.prompt_ids + wording.target_ids[:-1]
            whole = base.model(torch.tensor([ids])).logits[0, len(wording.prompt_ids) - 1 :]
            torch.testing.assert_close(logits_BTV[row, : len(wording.target_ids)], whole, atol=2e-4, rtol=1e-3)
            assert activations.labels_NT[row, : len(wording.target_ids)].tolist() == list(wording.target_ids)


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_a_window_of_attention_sees_what_it_would(name: str, tmp_path: Path) -> None:
    """Shorter than prompts and prefixes; in Qwen2 of some layers alone."""
    windows = {"use_sliding_window": True, "max_window_layers": 2} if name == "qwen2" else {}
    save_architecture(tmp_path, name, sliding_window=12, **windows)
    windowed = load_base_model(ModelSection(path=str(tmp_path), layer=1))
    suffix = load_suffix(tmp_path, 1, dtype="float32")
    sizes = [(4, 2, 0), (9, 6, 0), (20, 3, 0), (7, 2, 6), (26, 3, 6)]
    ids = torch.randint(5, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    wordings = [Wording(tuple(ids[:P]), tuple(ids[-T:]), "prefixed", shared) for P, T, shared in sizes]
    for chosen in (wordings, wordings[:3]):
        with torch.no_grad():
            logits_BTV = logits(suffix, extract(windowed, chosen))
            for row, wording in enumerate(chosen):
                whole = windowed.model(torch.tensor([wording.prompt_ids + wording.target_ids[:-1]])).logits[0]
                expected_TV = whole[len(wording.prompt_ids) - 1 :]
                torch.testing.assert_close(logits_BTV[row, : len(expected_TV)], expected_TV, atol=2e-4, rtol=1e-3)


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
