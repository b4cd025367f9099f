"""Fit one shard as the paper does (WISE, arXiv:2405.14768, §2.3): one edit after another, SGD, margin loss.

Every step reads all wordings of one edit (bare and behind ten generated prefixes: eleven rows) with the side memory on
the whole prompt, takes a plain gradient step inside the shard's mask, and clamps ΔW. Later edits know nothing of
earlier ones, unless `training.replay` switches on the replay of appendix B.3.

Where the authors' code (EasyEdit) differs from the paper, this follows the paper:

    theirs                                       here
    SGD with weight_decay 1e-5, applied to W_v'  none: it acts after the mask and leaks out of the subspace
    the target's tokens weigh 1/T each           −log P(y | x) of the whole target
    the target as it stands                      target and end of sequence, so that an answer can end
    hinges averaged over the rows they catch     averaged over all rows

One unrelated prompt stands beside an edit in all its steps, as in their code.

As in their code, an edit's steps end early when its loss is at most `training.stop_loss` and no longer moves. Only the
suffix runs: what enters and leaves layer L's FFN before ΔW is the same in every step. The result is that of a
full-model step (`benchmarks/reference_wise.py` takes them).
"""

import random
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config import TrainingSection
from pipeline.errors import TrainingDiverged
from pipeline.training.activations import IGNORED, Activations
from pipeline.training.edit_stream import EditStream, cropped, prompt_tokens
from pipeline.training.fit import Progress, edited_logits
from pipeline.wise.activation import routing_activation
from pipeline.wise.losses import Margins, edit_loss, margin_loss, replay_loss

STANDS_STILL = 1e-4  # change of the loss between two steps, as in the authors' code


def fit_paper(
    suffix: PreTrainedModel, stream: EditStream, *, mask_DF: Tensor, training: TrainingSection, seed: int
) -> Iterator[Progress | Tensor]:
    """Yields Progress after every edit and at last ΔW (float32, D × F, zero outside the mask).

    Raises TrainingDiverged when a loss is not finite. Equal inputs and thread count give equal bytes."""
    delta_DF = torch.zeros(mask_DF.shape, device=mask_DF.device, requires_grad=True)
    optimiser = torch.optim.SGD([delta_DF], lr=training.learning_rate)
    rng = random.Random(seed)
    unrelated = _endlessly(stream.unrelated, rng)
    past: list[Activations] = []
    step, holding, seen = 0, 0, 0
    for edit in stream.edits():
        before, beside = float("inf"), next(unrelated)
        for _ in range(training.max_steps):
            loss = _loss(suffix, edit, beside, delta_DF, training)
            if training.replay and past:
                loss = loss + _replay(rng.choice(past), delta_DF, training)
            now = float(loss.detach())
            if not now < float("inf"):
                raise TrainingDiverged(
                    f"The loss became non-finite at step {step}; lower training.learning_rate, which is "
                    f"{training.learning_rate}."
                )
            if now <= training.stop_loss and abs(now - before) <= STANDS_STILL:
                break
            take_step(loss, delta_DF, mask_DF, optimiser, clamp=training.clamp)
            before, step = now, step + 1
        past.append(edit)
        holding, seen = holding + len(edit) * (now <= training.stop_loss), seen + len(edit)
        yield Progress(step=step, loss=now, holding=holding, wordings=seen)
    yield delta_DF.detach()


def take_step(
    loss: Tensor, delta_DF: Tensor, mask_DF: Tensor, optimiser: torch.optim.Optimizer, *, clamp: float
) -> None:
    """One masked step; afterwards no entry of ΔW is larger than `clamp` (the paper's norm constraint)."""
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    assert delta_DF.grad is not None
    delta_DF.grad *= mask_DF
    optimiser.step()
    with torch.no_grad():
        delta_DF.clamp_(-clamp, clamp)


def _loss(
    suffix: PreTrainedModel, edit: Activations, unrelated: Activations, delta_DF: Tensor, training: TrainingSection
) -> Tensor:
    """L_edit + L_a of one edit; W a + ΔW a enters at every token."""
    logits_BTV = edited_logits(suffix, edit, delta_DF)
    margins = margin_loss(_activation(edit, delta_DF), _activation(unrelated, delta_DF), Margins(*training.margins))
    return edit_loss(logits_BTV, edit.labels_NT, ignored=IGNORED) + margins


def _replay(past: Activations, delta_DF: Tensor, training: TrainingSection) -> Tensor:
    """Shards are trained side by side, so there is no other memory's edit to keep quiet here."""
    return replay_loss(_activation(past, delta_DF), delta_DF.new_zeros(0), Margins(*training.margins))


def _activation(prompts: Activations, delta_DF: Tensor) -> Tensor:
    return routing_activation(prompts.keys_NTF, delta_DF, prompt_tokens(prompts))


def _endlessly(prompts: Activations, rng: random.Random) -> Iterator[Activations]:
    """One unrelated prompt after another, in a new order each time around."""
    while True:
        for row in rng.sample(range(len(prompts)), len(prompts)):
            yield cropped(prompts.select(torch.tensor([row])))
