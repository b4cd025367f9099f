"""Fit one shard: minimise −log P(target, EOS | prompt) over ΔW inside the shard's mask, in process, without Ray.

Differs from the paper's procedure (one edit after another, full-model forwards, SGD) in four ways: edits are visited
breadth-first in mini-batches, so none is forgotten while later ones are learned; only the suffix runs, on the target
tokens alone; Adam steps in coordinates in which the edits' keys lie apart (`wise/whitening.py`), which takes a tenth of
the steps; and, where asked for, the output ΔW adds at the other shards' keys is penalised, so that merging adds parts
that barely touch. There is no weight decay: it acts after the mask and would leak out of the subspace.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from pipeline.config import TrainingSection
from pipeline.errors import TrainingDiverged
from pipeline.models.suffix import suffix_logits
from pipeline.training.activations import IGNORED, Activations
from pipeline.wise.whitening import key_whitening

SIBLING_KEYS_PER_STEP = 512
LEAST_WORDINGS = 16  # of a pass
BARE_SHARE = 0.25  # of the steps; edits that do not hold bare by then go on with all their wordings
NEARLY_ALL, PATIENCE = 0.9, 0.25  # so many hold, and for so many of the steps no more: the rest cannot be learned


@dataclass(frozen=True)
class Progress:
    """After one pass over the wordings that did not hold yet."""

    step: int
    loss: float  # mean nats per target over the wordings seen, each as it was when it was last looked at
    holding: int  # wordings below the stop loss
    wordings: int


def fit(
    suffix: PreTrainedModel,
    activations: Activations,
    *,
    mask_DF: Tensor,
    sibling_keys_MF: Tensor,
    sibling_penalty: float,
    training: TrainingSection,
    seed: int,
    bare: int = 0,
    start_DF: Tensor | None = None,
) -> Iterator[Progress | Tensor]:
    """Yields Progress after every pass and at last ΔW (float32, D × F).

    The first `bare` rows are the edits asked bare. They are trained first, and then all wordings are looked at: most
    hold by then and cost no step. ΔW starts at zero, or at `start_DF`: then what holds there already is looked at
    first, and told as step 0. Outside the mask it stays as it started. It ends when every wording holds, after
    `max_steps`, or, when ΔW started at zero, when the last few do not come to hold: some edits find no room in their
    subspace, and what is merged of several has more. Equal inputs and thread count give equal bytes.

    Raises TrainingDiverged when a loss is not finite.
    """
    # ΔW = start + mask ⊙ (V P); Adam moves V.
    begun_DF = torch.zeros(mask_DF.shape, device=mask_DF.device) if start_DF is None else start_DF
    whitening = key_whitening(activations.target_keys_MF(), ridge=training.key_ridge)
    steps_DF = torch.zeros_like(begun_DF, requires_grad=True)
    optimiser = torch.optim.Adam([steps_DF], lr=training.learning_rate)
    generator = torch.Generator().manual_seed(seed)

    def delta() -> Tensor:
        return begun_DF + whitening(steps_DF) * mask_DF

    def audit() -> Tensor:
        """Every wording as it is now: later steps may have undone earlier ones."""
        return _checked(
            target_losses(suffix, activations, delta().detach(), batch=training.batch_prompts), step, training
        )

    # Where nearly all holds already, fuller passes undo less of it; to look at all of it again costs more than these.
    least = LEAST_WORDINGS if start_DF is None else max(LEAST_WORDINGS, training.batch_prompts)
    step, losses_N = 0, torch.full((len(activations),), float("inf"))
    asked, over, most, grew_at = bare or len(activations), False, 0, 0
    if start_DF is not None:
        losses_N = audit()
        over = _all_hold(losses_N, training)
        yield _progress(step, losses_N, training.stop_loss)
    while not over:
        order = _next_pass(losses_N[:asked], training, generator, least=least)
        for chosen in torch.split(order, training.batch_prompts)[: training.max_steps - step]:
            delta_DF = delta()
            loss_B = _target_loss(suffix, activations.select(chosen), delta_DF)
            penalty = _sibling_output(delta_DF, sibling_keys_MF, generator) if sibling_penalty else 0.0
            optimiser.zero_grad()
            (loss_B.mean() + sibling_penalty * penalty).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            step += 1
            losses_N[chosen] = _checked(loss_B.detach().cpu(), step, training)
        bare_is_over = step >= BARE_SHARE * training.max_steps or _all_hold(losses_N[:asked], training)
        audited = bare_is_over and asked < len(activations)
        if audited:
            asked, losses_N = len(activations), audit()
        holding = int((losses_N <= training.stop_loss).sum())
        if holding > most:
            most, grew_at = holding, step
        stalls = most >= NEARLY_ALL * len(activations) and step - grew_at >= PATIENCE * training.max_steps
        given_up = step == training.max_steps or (stalls and start_DF is None)
        if not audited and (given_up or holding == len(activations)):
            losses_N = audit()
        over = given_up or _all_hold(losses_N, training)
        yield _progress(step, losses_N, training.stop_loss)
    yield delta().detach()


def _all_hold(losses_N: Tensor, training: TrainingSection) -> bool:
    return bool((losses_N <= training.stop_loss).all())


def _checked(losses_B: Tensor, step: int, training: TrainingSection) -> Tensor:
    if not bool(losses_B.isfinite().all()):
        raise TrainingDiverged(
            f"The loss became non-finite at step {step}; lower training.learning_rate, which is "
            f"{training.learning_rate}."
        )
    return losses_B


def _progress(step: int, losses_N: Tensor, stop_loss: float) -> Progress:
    holding = int((losses_N <= stop_loss).sum())
    seen_M = losses_N[losses_N.isfinite()]
    return Progress(step=step, loss=float(seen_M.mean()), holding=holding, wordings=len(losses_N))


def _next_pass(losses_N: Tensor, training: TrainingSection, generator: torch.Generator, *, least: int) -> Tensor:
    """The wordings that do not hold yet, and at least as many that do, so that these are not undone."""
    shuffled = torch.randperm(len(losses_N), generator=generator)
    holds = losses_N[shuffled] <= training.stop_loss
    pending, holding = shuffled[~holds], shuffled[holds]
    chosen = torch.cat([pending, holding[: max(len(pending), least - len(pending))]])
    return chosen[torch.randperm(len(chosen), generator=generator)]


def edited_logits(suffix: PreTrainedModel, batch: Activations, delta_DF: Tensor) -> Tensor:
    """Logits B × T × V where W a + ΔW a enters at each of the batch's positions."""
    hidden_BTD = batch.hidden_NTD + batch.keys_NTF @ delta_DF.T
    return suffix_logits(
        suffix,
        hidden_BTD.to(suffix.dtype),
        past=batch.past,
        past_mask_BP=batch.past_mask_NP,
        positions_BT=batch.positions_NT,
    )


def _target_loss(suffix: PreTrainedModel, batch: Activations, delta_DF: Tensor) -> Tensor:
    """−log P(y, EOS | x) per wording, in nats; W a + ΔW a enters at the last prompt token and after it."""
    length_B, by_length_B = (batch.labels_NT != IGNORED).sum(dim=1).sort(stable=True)
    short, long = by_length_B.tensor_split([_least_padding(length_B)])
    losses_B = torch.cat(
        [_loss_of_rows(suffix, batch.select(rows).trimmed(), delta_DF) for rows in (short, long) if len(rows)]
    )
    return losses_B[by_length_B.argsort()]


def _least_padding(length_B: Tensor) -> int:
    """Where to cut rows of ascending length in two, so that the fewest tokens are computed: otherwise most of a batch
    is padding to its longest target. More than two parts cost more calls than they save."""
    shorter_B = torch.arange(1, len(length_B) + 1, device=length_B.device)
    computed_B = shorter_B * length_B + (len(length_B) - shorter_B) * length_B[-1]
    return len(length_B) - int(computed_B.flip(0).argmin())  # of equals the last: no cut where none saves anything


def _loss_of_rows(suffix: PreTrainedModel, rows: Activations, delta_DF: Tensor) -> Tensor:
    logits_BTV = edited_logits(suffix, rows, delta_DF)
    losses_BT = cross_entropy(
        logits_BTV.float().flatten(0, 1), rows.labels_NT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses_BT.view_as(rows.labels_NT).sum(dim=1)


@torch.no_grad()
def target_losses(suffix: PreTrainedModel, activations: Activations, delta_DF: Tensor, *, batch: int) -> Tensor:
    """−log P(y, EOS | x) of every wording, in nats, on the CPU."""
    index = torch.arange(len(activations))
    return torch.cat(
        [_target_loss(suffix, activations.select(chosen), delta_DF).cpu() for chosen in torch.split(index, batch)]
    )


def _sibling_output(delta_DF: Tensor, keys_MF: Tensor, generator: torch.Generator) -> Tensor:
    """mean ‖ΔW a‖² over a sample of the other shards' keys: what this shard would say at their prompts."""
    if len(keys_MF) == 0:
        return delta_DF.new_zeros(())
    chosen = torch.randint(len(keys_MF), (SIBLING_KEYS_PER_STEP,), generator=generator)
    return (keys_MF[chosen] @ delta_DF.T).square().sum(dim=1).mean()
