"""The paper's losses against sums written out by hand."""

import math

import pytest
import torch

from pipeline.wise.losses import Margins, edit_loss, margin_loss, replay_loss

MARGINS = Margins(alpha=5.0, beta=20.0, gamma=10.0)


def by_hand(edits: list[float], unrelated: list[float]) -> float:
    """The three hinges of the paper, one number at a time."""
    quiet = sum(max(0.0, i - 5.0) for i in unrelated) / len(unrelated)
    loud = sum(max(0.0, 20.0 - e) for e in edits) / len(edits)
    apart = sum(max(0.0, 10.0 - (e - i)) for e in edits for i in unrelated) / (len(edits) * len(unrelated))
    return quiet + loud + apart


@pytest.mark.parametrize(
    ("edits", "unrelated"),
    [
        ([0.0], [0.0]),  # before the first step: β + γ
        ([25.0, 31.0], [1.0, 4.0]),  # all margins kept: nothing left to learn
        ([12.0, 25.0], [18.0]),
        ([20.5], [11.0, 3.0, 40.0]),
    ],
)
def test_the_margin_loss_is_the_papers(edits: list[float], unrelated: list[float]) -> None:
    loss = margin_loss(torch.tensor(edits), torch.tensor(unrelated), MARGINS)
    assert float(loss) == pytest.approx(by_hand(edits, unrelated))


def test_margins_that_hold_give_no_gradient() -> None:
    edits, unrelated = torch.tensor([30.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    margin_loss(edits, unrelated, MARGINS).backward()
    assert float(edits.grad) == float(unrelated.grad) == 0  # type: ignore[arg-type]


def test_the_margin_loss_raises_edits_and_lowers_unrelated_prompts() -> None:
    edits, unrelated = torch.tensor([10.0], requires_grad=True), torch.tensor([8.0], requires_grad=True)
    margin_loss(edits, unrelated, MARGINS).backward()
    assert float(edits.grad) == -2 and float(unrelated.grad) == 2  # type: ignore[arg-type]


def test_replay_keeps_past_edits_loud_and_other_memories_edits_quiet() -> None:
    past, elsewhere = torch.tensor([15.0, 30.0]), torch.tensor([9.0])
    assert float(replay_loss(past, elsewhere, MARGINS)) == pytest.approx((5.0 + 0.0) / 2 + 4.0)
    assert float(replay_loss(past, torch.zeros(0), MARGINS)) == pytest.approx(2.5)
    assert float(replay_loss(torch.zeros(0), torch.zeros(0), MARGINS)) == 0


def test_the_edit_loss_is_minus_log_p_of_the_target() -> None:
    """Oracle: −log of the probabilities, the padded token left out, rows weighing the same."""
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], [[0.2, 0.7, 0.1], [0.3, 0.3, 0.4]]]))
    labels = torch.tensor([[0, 2], [1, -100]])
    wanted = (-(math.log(0.5) + math.log(0.8)) - math.log(0.7)) / 2
    assert float(edit_loss(logits, labels, ignored=-100)) == pytest.approx(wanted)
