"""What the unedited model makes of texts; calibration asks several times about the same ones, and each is read once."""

from collections.abc import Sequence

import torch

from pipeline.models.base_model import BaseModel
from pipeline.models.prompts import plain_prompt_ids
from pipeline.training.activations import PromptStates, read_prompts


class PromptReader:
    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._row_of: dict[str, int] = {}
        self._parts: list[PromptStates] = []

    def read(self, texts: Sequence[str]) -> PromptStates:
        """One row per text, in their order."""
        new = [text for text in dict.fromkeys(texts) if text not in self._row_of]
        if new:
            self._parts.append(read_prompts(self._base, [plain_prompt_ids(text, self._base.tokenizer) for text in new]))
            self._row_of |= {text: row for row, text in enumerate(new, start=len(self._row_of))}
        rows_N = torch.tensor([self._row_of[text] for text in texts])
        return PromptStates(*(torch.cat(column)[rows_N] for column in zip(*self._parts, strict=True)))
