"""Context prefixes as the frozen model reads them, once for all wordings that begin with them.

Every edit is worded behind a few texts of one small pool (`contexts.py`), so a third of what extraction would read, and
more, is the same texts again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.models.base_model import BaseModel
from pipeline.models.suffix import PastKeyValues
from pipeline.training.tokens import Wording


@dataclass(frozen=True)
class Prefixes:
    """U prefixes as every layer of the frozen model reads them: several wordings share one, which is read once."""

    row_of: dict[tuple[int, ...], int]
    mask_UQ: Tensor
    layers: PastKeyValues

    def of(self, rows: Sequence[int | None]) -> tuple[DynamicCache, Tensor]:
        """Of these rows, with what they do not use masked; empty where none uses any."""
        if all(row is None for row in rows):
            return DynamicCache(), torch.zeros(len(rows), 0, dtype=torch.long)
        index_B = torch.tensor([0 if row is None else row for row in rows])
        used_B1 = torch.tensor([[row is not None] for row in rows])
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.layers):
            cache.update(keys[index_B.to(keys.device)], values[index_B.to(values.device)], number)
        return cache, self.mask_UQ[index_B] * used_B1


@torch.no_grad()
def read_prefixes(base: BaseModel, wordings: Sequence[Wording]) -> Prefixes:
    """All that the wordings share, in one forward: the same wordings give the same bytes."""
    texts = sorted({wording.prompt_ids[: wording.shared] for wording in wordings if wording.shared})
    longest = max(map(len, texts), default=0)
    ids_UQ = torch.full((len(texts), longest), base.tokenizer.pad_token_id)
    mask_UQ = torch.zeros_like(ids_UQ)
    for row, text in enumerate(texts):
        ids_UQ[row, longest - len(text) :] = torch.tensor(text)
        mask_UQ[row, longest - len(text) :] = 1
    layers: PastKeyValues = []
    if texts:
        output = base.model.base_model(
            input_ids=ids_UQ.to(base.device),
            attention_mask=mask_UQ.to(base.device),
            position_ids=(mask_UQ.cumsum(dim=1) - 1).clamp(min=0).to(base.device),
            past_key_values=DynamicCache(),  # the model's own would forget what is behind a window of attention
            use_cache=True,
        )
        layers = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
    return Prefixes({text: row for row, text in enumerate(texts)}, mask_UQ, layers)
