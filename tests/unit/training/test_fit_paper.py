"""The paper's procedure: what it extracts, the steps it takes, and what it leaves."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.config import TrainingSection
from pipeline.edits import Edit
from pipeline.errors import TrainingDiverged
from pipeline.models.base_model import BaseModel
from pipeline.models.suffix import load_suffix, suffix_logits
from pipeline.models.value_matrix import value_module
from pipeline.training.activations import extract
from pipeline.training.edit_stream import EditStream, choose_unrelated, extract_prompts, prompt_tokens
from pipeline.training.fit import Progress
from pipeline.training.fit_paper import fit_paper
from pipeline.training.tokens import Wording, wordings
from pipeline.wise.activation import routing_activation
from pipeline.wise.masks import subspace_mask

EDITS = [Edit(prompt=f"Who leads company {name}?", target=leader) for name, leader in (("Ap", "Bq"), ("Cr", "Dt"))]
UNRELATED = ["Paris is", "日本の首都は"]
TRAINING = TrainingSection(
    procedure="paper", max_steps=70, learning_rate=0.3, stop_loss=0.02, margins=(0.5, 2.0, 1.0), clamp=1.0
)


def asked(base: BaseModel) -> list[list[Wording]]:
    return [wordings(edit, base.tokenizer, prefixes=["Paris is."], max_tokens=256) for edit in EDITS]


def stream(base: BaseModel) -> EditStream:
    of_edits = asked(base)
    flat = [wording for of_edit in of_edits for wording in of_edit]
    return EditStream(
        extract(base, flat, whole_prompt=True), tuple(map(len, of_edits)), extract_prompts(base, UNRELATED)
    )


def train(
    base: BaseModel, folder: Path, training: TrainingSection = TRAINING, *, seed: int = 0
) -> tuple[list[Progress], Tensor, Tensor]:
    mask_DF = subspace_mask((32, 64), seed=1, shard=0, density=0.5, disjoint=False)
    suffix = load_suffix(folder, base.layer, dtype="float32")
    *progress, fit = fit_paper(suffix, stream(base), mask_DF=mask_DF, training=training, seed=seed)
    assert all(isinstance(item, Progress) for item in progress) and isinstance(fit, Tensor)
    return progress, fit, mask_DF  # type: ignore[return-value]


def full_model(base: BaseModel, ids: tuple[int, ...], delta_DF: Tensor) -> tuple[Tensor, Tensor]:
    """Oracle: the whole model, one sequence, W_v' = W_v + ΔW at every token. Logits T × V and A(x) T × F."""
    seen: list[Tensor] = []

    def add(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(inputs[0][0])
        return output + inputs[0] @ delta_DF.T

    handle = value_module(base.model, base.layer).register_forward_hook(add)
    try:
        logits: Tensor = base.model(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits, seen[0]


def test_the_suffix_on_whole_sequences_is_the_whole_model_with_the_side_memory_everywhere(
    base: BaseModel, model_folder: Path
) -> None:
    extracted = stream(base).activations
    delta_DF = 0.1 * torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_NTV = suffix_logits(
            load_suffix(model_folder, base.layer, dtype="float32"),
            extracted.hidden_NTD + extracted.keys_NTF @ delta_DF.T,
            past=extracted.past,
            past_mask_BP=extracted.past_mask_NP,
            positions_BT=extracted.positions_NT,
        )
        for row, wording in enumerate(wording for of_edit in asked(base) for wording in of_edit):
            ids = wording.prompt_ids + wording.target_ids[:-1]
            logits_TV, keys_TF = full_model(base, ids, delta_DF)
            assert torch.allclose(logits_NTV[row, : len(ids)], logits_TV, atol=1e-4)
            assert torch.allclose(extracted.keys_NTF[row, : len(ids)], keys_TF, atol=1e-5)
            assert int(prompt_tokens(extracted)[row].sum()) == len(wording.prompt_ids)
            labels = extracted.labels_NT[row]
            assert tuple(labels[labels >= 0].tolist()) == wording.target_ids


def test_the_first_step_is_the_gradient_of_the_paper_s_loss_inside_the_mask(
    base: BaseModel, model_folder: Path
) -> None:
    """Oracle: the loss of the first edit through the whole model, one sequence at a time, and autograd alone."""
    one = TRAINING.model_copy(update={"max_steps": 1, "clamp": 100.0})
    given = EditStream(
        extract(base, asked(base)[0], whole_prompt=True),
        (len(asked(base)[0]),),
        extract_prompts(base, UNRELATED[:1]),
    )
    mask_DF = subspace_mask((32, 64), seed=1, shard=0, density=0.5, disjoint=False)
    suffix = load_suffix(model_folder, base.layer, dtype="float32")
    *_, fit = fit_paper(suffix, given, mask_DF=mask_DF, training=one, seed=0)
    delta_DF = torch.zeros(32, 64, requires_grad=True)
    losses = []
    for wording in asked(base)[0]:
        logits_TV, _ = full_model(base, wording.prompt_ids + wording.target_ids[:-1], delta_DF)
        targets = logits_TV[len(wording.prompt_ids) - 1 :]
        losses.append(cross_entropy(targets, torch.tensor(wording.target_ids), reduction="sum"))
    torch.stack(losses).mean().backward()  # Δ_act is 0 and so is its gradient: only L_edit moves ΔW = 0
    assert isinstance(fit, Tensor) and delta_DF.grad is not None
    assert torch.allclose(fit, -0.3 * delta_DF.grad * mask_DF, atol=1e-5)


def test_the_delta_is_zero_outside_its_mask_and_clamped_inside(base: BaseModel, model_folder: Path) -> None:
    _, fit, mask_DF = train(base, model_folder, TRAINING.model_copy(update={"clamp": 0.05}))
    assert not fit[~mask_DF].any()
    assert float(fit.abs().max()) == pytest.approx(0.05)


def test_the_last_edit_is_learned_and_one_edit_is_reported_at_a_time(base: BaseModel, model_folder: Path) -> None:
    progress, fit, _ = train(base, model_folder)
    assert [item.wordings for item in progress] == [3, 6]
    wording = asked(base)[-1][0]
    with torch.no_grad():
        logits_TV, _ = full_model(base, wording.prompt_ids + wording.target_ids[:-1], fit)
    assert tuple(logits_TV[len(wording.prompt_ids) - 1 :].argmax(dim=1).tolist()) == wording.target_ids


def test_same_seed_same_bytes(base: BaseModel, model_folder: Path) -> None:
    (_, first, _), (_, second, _) = train(base, model_folder), train(base, model_folder)
    assert torch.equal(first, second)


def test_replay_keeps_earlier_edits_louder(base: BaseModel, model_folder: Path) -> None:
    def first_edit(training: TrainingSection) -> float:
        _, fit, _ = train(base, model_folder, training)
        edit = next(stream(base).edits())
        return float(routing_activation(edit.keys_NTF, fit, prompt_tokens(edit)).mean())

    # β out of reach, so that there is always something to gain, and steps too small to reach the clamp.
    gentle = TRAINING.model_copy(update={"margins": (1e3, 1e4, 1.0), "learning_rate": 1e-3, "max_steps": 10})
    assert first_edit(gentle.model_copy(update={"replay": True})) > 1.1 * first_edit(gentle)


def test_a_loss_that_is_not_finite_is_refused_with_a_remedy(base: BaseModel, model_folder: Path) -> None:
    wild = TRAINING.model_copy(update={"learning_rate": 1e38, "clamp": float("inf")})
    with pytest.raises(TrainingDiverged, match=r"lower training\.learning_rate"):
        train(base, model_folder, wild)


def test_unrelated_prompts_are_the_given_ones_or_texts_that_name_no_subject() -> None:
    texts = ["Ada leads it.", "It rains."]
    assert choose_unrelated(texts, ("What is this?",), ["Ada"]) == ["What is this?"]
    assert choose_unrelated(texts, (), ["Ada", None]) == ["It rains."]
    assert choose_unrelated(texts[:1], (), ["Ada"]) == texts[:1]
