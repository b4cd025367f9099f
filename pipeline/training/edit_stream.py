"""What the paper's procedure trains on: whole sequences, edit after edit, and prompts that are no business of theirs.

The side memory acts on the whole prompt there, so nothing above layer L can be kept from the base model. What enters
and what leaves layer L's FFN can: it is extracted once, for every token, and the suffix runs over all of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.base_model import BaseModel
from pipeline.models.mentions import SubjectIndex
from pipeline.models.prompts import plain_prompt_ids
from pipeline.training.activations import IGNORED, Activations, extract
from pipeline.training.tokens import Wording


@dataclass(frozen=True)
class EditStream:
    """`activations` has each edit's wordings one below the other, the bare one first; `wordings` counts them."""

    activations: Activations
    wordings: tuple[int, ...]
    unrelated: Activations  # the paper's x_i; only their prompts are looked at

    def __len__(self) -> int:
        return len(self.activations)

    def to(self, device: torch.device) -> "EditStream":
        return EditStream(self.activations.to(device), self.wordings, self.unrelated.to(device))

    def edits(self) -> Iterator[Activations]:
        """One edit's wordings at a time, without the columns that are padding in all of them."""
        for rows in torch.split(torch.arange(len(self.activations)), list(self.wordings)):
            yield cropped(self.activations.select(rows))


def prompt_tokens(activations: Activations) -> Tensor:
    """N × T, true at the prompt's tokens of whole sequences: the last of them predicts the first target token."""
    first_N = (activations.labels_NT != IGNORED).int().argmax(dim=1)
    columns_T = torch.arange(activations.labels_NT.shape[1], device=first_N.device)
    return columns_T <= first_N[:, None]


def cropped(activations: Activations) -> Activations:
    """Without the last columns if no row reads anything there."""
    used_T = (activations.labels_NT != IGNORED).any(dim=0)
    T = int(used_T.nonzero()[-1]) + 1
    return Activations(
        states_ND=activations.states_ND,
        keys_NTF=activations.keys_NTF[:, :T],
        hidden_NTD=activations.hidden_NTD[:, :T],
        labels_NT=activations.labels_NT[:, :T],
        positions_NT=activations.positions_NT[:, :T],
        past=activations.past,
        past_mask_NP=activations.past_mask_NP,
    )


def extract_prompts(base: BaseModel, prompts: Sequence[str]) -> Activations:
    """Whole prompts without targets; the one labelled token only marks where each of them ends."""
    wordings = [
        Wording(prompt_ids=ids, target_ids=(base.end_ids[0],))
        for prompt in prompts
        if 0 < len(ids := plain_prompt_ids(prompt, base.tokenizer)) <= base.max_tokens
    ]
    return extract(base, wordings, whole_prompt=True)


def choose_unrelated(texts: Sequence[str], given: Sequence[str], subjects: Sequence[str | None]) -> list[str]:
    """The paper's D_irr: prompts somebody vouches for where there are any (`training.unrelated_prompts`), else texts
    the base model writes by itself. A model recites what it knows, so texts that mention an edit's subject are left
    out (all of them only if nothing else were left)."""
    if given:
        return list(given)
    index = SubjectIndex(subjects)
    return [text for text in texts if not index.mentions(text)] or list(texts)
