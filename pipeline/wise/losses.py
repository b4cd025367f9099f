"""The paper's losses (WISE, arXiv:2405.14768, §2.3.1 and appendix B.3).

    L = L_edit + L_a (+ L_replay)
    L_edit = −log P(y_e | x_e)
    L_a    = max(0, Δ_act(x_i) − α) + max(0, β − Δ_act(x_e)) + max(0, γ − (Δ_act(x_e) − Δ_act(x_i)))

x_e is an edit, x_i an unrelated prompt. Each hinge is averaged over all its rows; the authors' code averages over the
rows that violate it, which makes the last violator as loud as all of them. Δ_act is in `activation.py`.
Shape letters: B rows of an edit (its wordings), I unrelated prompts, T tokens, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Margins:
    """Published per model: see `pipeline/presets.py`."""

    alpha: float  # most an unrelated prompt may activate
    beta: float  # least an edit must
    gamma: float  # least distance between the two


def edit_loss(logits_BTV: Tensor, labels_BT: Tensor, *, ignored: int) -> Tensor:
    """L_edit = −log P(y | x), the sum over the target's tokens in nats, averaged over the rows. The authors' code takes
    the mean over the tokens, which lets the margins drown it."""
    losses_BT = cross_entropy(
        logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=ignored, reduction="none"
    ).view_as(labels_BT)
    mean: Tensor = losses_BT.sum(dim=1).mean()
    return mean


def margin_loss(edits_B: Tensor, unrelated_I: Tensor, margins: Margins) -> Tensor:
    """L_a from Δ_act of the edit's rows and of the unrelated prompts; γ holds for every pair of them."""
    quiet = (unrelated_I - margins.alpha).relu().mean()
    loud = (margins.beta - edits_B).relu().mean()
    apart = (margins.gamma - (edits_B[:, None] - unrelated_I[None, :])).relu().mean()
    return quiet + loud + apart


def replay_loss(past_B: Tensor, elsewhere_B: Tensor, margins: Margins) -> Tensor:
    """Appendix B.3, for WISE-Retrieve: past edits of this memory keep activating it, edits of other memories do not.

    max(0, β − Δ_act(x_past)) + max(0, Δ_act(x_elsewhere) − α); either may be empty. The authors' code writes 20 and 5
    for β and α, whatever the config says.
    """
    zero = past_B.new_zeros(())
    past = (margins.beta - past_B).relu().mean() if len(past_B) else zero
    elsewhere = (elsewhere_B - margins.alpha).relu().mean() if len(elsewhere_B) else zero
    return past + elsewhere
