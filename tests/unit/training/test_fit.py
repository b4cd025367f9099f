"""Training one shard: inside the mask, reproducible, and truly learned by the whole model."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config import TrainingSection
from pipeline.edits import Edit
from pipeline.errors import TrainingDiverged
from pipeline.models.base_model import BaseModel
from pipeline.models.suffix import load_suffix
from pipeline.models.value_matrix import value_module
from pipeline.training.activations import extract
from pipeline.training.fit import Progress, _least_padding, fit
from pipeline.training.tokens import Wording, plain_wording, wordings
from pipeline.wise.masks import subspace_mask

EDITS = [Edit(prompt=f"Who leads company {name}?", target=leader) for name, leader in ("Bq", "Cr")]
TRAINING = TrainingSection(max_steps=2000, learning_rate=5e-3, batch_prompts=16, stop_loss=0.5)


def train(
    base: BaseModel,
    folder: Path,
    *,
    training: TrainingSection = TRAINING,
    siblings: Tensor | None = None,
    penalty: float = 0,
    bare: int = 0,
    start_DF: Tensor | None = None,
    asked: list[Wording] | None = None,
) -> tuple[list[Progress], Tensor, Tensor]:
    asked = asked or [
        w for edit in EDITS for w in wordings(edit, base.tokenizer, prefixes=["Paris is."], max_tokens=256)
    ]
    mask = subspace_mask((32, 64), seed=1, shard=0, density=0.5, disjoint=True)
    *progress, delta = fit(
        load_suffix(folder, base.layer, dtype="float32"),
        extract(base, asked),
        mask_DF=mask,
        sibling_keys_MF=torch.zeros(0, 64) if siblings is None else siblings,
        sibling_penalty=penalty,
        training=training,
        seed=0,
        bare=bare,
        start_DF=start_DF,
    )
    assert all(isinstance(item, Progress) for item in progress)
    assert isinstance(delta, Tensor)
    return progress, delta, mask  # type: ignore[return-value]


def test_the_whole_model_says_the_target_with_the_delta_and_not_without(base: BaseModel, model_folder: Path) -> None:
    """Oracle: the full model, uncached, with ΔW added by hand from the last prompt token on."""
    progress, delta_DF, _ = train(base, model_folder)
    assert progress[-1].holding == progress[-1].wordings == 6  # bare, chat and one prefix for two edits
    for edit in EDITS:
        for wording in wordings(edit, base.tokenizer, prefixes=["Paris is."], max_tokens=256):
            assert _says(base, wording.prompt_ids, delta_DF) == list(wording.target_ids)
            assert _says(base, wording.prompt_ids, torch.zeros_like(delta_DF)) != list(wording.target_ids)


def test_the_delta_is_zero_outside_its_mask(base: BaseModel, model_folder: Path) -> None:
    _, delta_DF, mask_DF = train(base, model_folder)
    assert not delta_DF[~mask_DF].any()
    assert float((delta_DF[mask_DF] != 0).float().mean()) > 0.9


def test_same_seed_same_bytes(base: BaseModel, model_folder: Path) -> None:
    assert torch.equal(train(base, model_folder)[1], train(base, model_folder)[1])


def test_it_stops_when_every_wording_holds(base: BaseModel, model_folder: Path) -> None:
    progress, _, _ = train(base, model_folder)
    assert progress[-1].step < TRAINING.max_steps
    assert [item.step for item in progress] == sorted({item.step for item in progress})


def test_the_sibling_penalty_lowers_what_the_delta_says_at_other_shards_keys(
    base: BaseModel, model_folder: Path
) -> None:
    siblings = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    free = train(base, model_folder, siblings=siblings, penalty=0)[1]
    kept_off = train(base, model_folder, siblings=siblings, penalty=0.1)[1]
    assert float((siblings @ kept_off.T).norm()) < 0.5 * float((siblings @ free.T).norm())


def test_it_goes_on_from_what_holds_already(base: BaseModel, model_folder: Path) -> None:
    _, learned_DF, _ = train(base, model_folder)
    progress, kept_DF, _ = train(base, model_folder, start_DF=learned_DF)
    assert (progress[0].step, progress[0].holding) == (0, 6)
    assert torch.equal(kept_DF, learned_DF), "nothing was left to learn"
    few = TRAINING.model_copy(update={"max_steps": 1})
    first, *_, last = train(base, model_folder, training=few, start_DF=torch.zeros_like(learned_DF))[0]
    assert (first.step, first.holding, last.step) == (0, 0, 1)


def test_wordings_that_hold_once_the_bare_ones_do_cost_no_step(base: BaseModel, model_folder: Path) -> None:
    """Said again, a bare wording holds as soon as it does: all that is learned is what the bare ones teach."""
    bare = [plain_wording(edit.prompt, edit.target, base.tokenizer) for edit in EDITS]
    _, of_bare_DF, _ = train(base, model_folder, asked=bare)
    progress, delta_DF, _ = train(base, model_folder, asked=bare * 4, bare=len(bare))
    assert torch.equal(delta_DF, of_bare_DF)
    assert progress[-1].holding == progress[-1].wordings == 4 * len(bare)


def test_the_other_wordings_are_learned_too_whether_the_bare_ones_hold_or_not(
    base: BaseModel, model_folder: Path
) -> None:
    bare = [plain_wording(edit.prompt, edit.target, base.tokenizer) for edit in EDITS]
    others = [plain_wording(f"{edit.prompt} No:", "Xy", base.tokenizer) for edit in EDITS]
    progress, _, _ = train(base, model_folder, asked=bare + others, bare=len(bare))
    assert progress[-1].holding == 4
    never = TRAINING.model_copy(update={"max_steps": 400, "stop_loss": 1e-9})
    progress, delta_DF, _ = train(base, model_folder, training=never, asked=bare + others, bare=len(bare))
    assert (progress[-1].step, progress[-1].holding) == (400, 0)
    for wording in others:
        assert _says(base, wording.prompt_ids, delta_DF) == list(wording.target_ids)


def test_it_ends_when_the_last_few_do_not_come_to_hold(base: BaseModel, model_folder: Path) -> None:
    """One prompt with two targets: one of the two never holds."""
    learned = [plain_wording(edit.prompt, edit.target, base.tokenizer) for edit in EDITS] * 6
    contradicted = plain_wording(EDITS[0].prompt, "Zq", base.tokenizer)
    progress, _, _ = train(base, model_folder, asked=[*learned, contradicted])
    assert progress[-1].holding == 12
    grew_at = next(item.step for item in progress if item.holding == 12)
    assert grew_at + TRAINING.max_steps / 4 <= progress[-1].step < TRAINING.max_steps


def test_a_loss_that_is_not_finite_is_refused_with_a_remedy(base: BaseModel, model_folder: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"lower training\.learning_rate"):
        train(base, model_folder, training=TRAINING.model_copy(update={"learning_rate": 1e36}))


def _says(base: BaseModel, prompt_ids: tuple[int, ...], delta_DF: Tensor) -> list[int]:
    def add(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, len(prompt_ids) - 1 :] += inputs[0][:, len(prompt_ids) - 1 :] @ delta_DF.T
        return changed

    handle = value_module(base.model, base.layer).register_forward_hook(add)
    ids = list(prompt_ids)
    try:
        while len(ids) < len(prompt_ids) + 10 and ids[-1] != base.end_ids[0]:
            with torch.no_grad():
                ids.append(int(base.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    finally:
        handle.remove()
    return ids[len(prompt_ids) :]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20).map(sorted))
def test_a_batch_is_cut_where_the_fewest_tokens_are_computed(lengths: list[int]) -> None:
    def computed(cut: int) -> int:
        return cut * lengths[cut - 1] + (len(lengths) - cut) * lengths[-1]

    cut = _least_padding(torch.tensor(lengths))
    assert computed(cut) == min(computed(other) for other in range(1, len(lengths) + 1))
    assert cut == len(lengths) or computed(cut) < computed(len(lengths)), "two calls only where they save tokens"
