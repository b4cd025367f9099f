"""The suffix: what runs after W_v of the edited layer L, as a model of its own.

Everything up to W_v is frozen, and so are the prompt's keys and values above it. A shard therefore trains on the layers
L+1…N, the final norm and the head alone; they are read by themselves from the safetensors, so a trainer never holds the
rest. The suffix is the same architecture with fewer layers, fed through `inputs_embeds`.
"""

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pipeline.models.base_model import load_config
from pipeline.models.value_matrix import Architecture, architecture

PastKeyValues = list[tuple[Tensor, Tensor]]
"""Keys and values of each suffix layer, B × heads × P × head_dim."""


def load_suffix(folder: Path, layer: int, *, dtype: str) -> PreTrainedModel:
    """Layers after `layer`, final norm and head of the model in `folder`; every other tensor stays on disk."""
    config = load_config(folder)
    row = architecture(config)
    state = dict(_suffix_tensors(folder, config, layer))
    suffix: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=suffix_config(config, layer), state_dict=state, dtype=getattr(torch, dtype)
    )
    if not config.tie_word_embeddings:
        suffix.set_input_embeddings(nn.Identity())  # only the head reads the vocabulary
    if row.positions is not None:
        # Learned positions are added to `inputs_embeds`, but the layer-L output carries them already.
        suffix.get_submodule(row.positions).weight.data.zero_()
    return suffix.requires_grad_(False).eval()


def suffix_config(config: PretrainedConfig, layer: int) -> PretrainedConfig:
    """The model's own config with the layers up to and including `layer` cut away."""
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = config.num_hidden_layers - layer - 1
    if getattr(config, "layer_types", None):
        shorter.layer_types = list(config.layer_types[layer + 1 :])
    return shorter


def suffix_logits(
    suffix: PreTrainedModel,
    hidden_BTD: Tensor,
    *,
    past: PastKeyValues,
    past_mask_BP: Tensor,
    positions_BT: Tensor,
) -> Tensor:
    """Logits B × T × V of the target positions, from the layer-L output there and the prompt's frozen KV.

    All of it is computed in the suffix's dtype. `past` is padded on the left to P tokens (`past_mask_BP` is 0 there);
    targets are padded on the right, where causal attention keeps padding from being seen.
    """
    cache = DynamicCache()
    for index, (key, value) in enumerate(past):
        cache.update(key.to(suffix.dtype), value.to(suffix.dtype), index)
    ones_BT = torch.ones(hidden_BTD.shape[:2], dtype=past_mask_BP.dtype, device=hidden_BTD.device)
    mask = torch.cat([past_mask_BP, ones_BT], dim=1) if past else ones_BT
    output = suffix(
        inputs_embeds=hidden_BTD.to(suffix.dtype),
        attention_mask=mask,
        position_ids=positions_BT,
        past_key_values=cache if past else None,
        use_cache=bool(past),
    )
    logits: Tensor = output.logits
    return logits


def _suffix_tensors(folder: Path, config: PretrainedConfig, layer: int) -> Iterator[tuple[str, Tensor]]:
    """Suffix tensors under the names they have in the shorter model. Checkpoints may lack the outer prefix
    (`h.0.…` for `transformer.h.0.…`), so layers are recognised by the last part of the path."""
    row = architecture(config)
    numbered = re.compile(rf"(^|\.){re.escape(_last(row.blocks))}\.(\d+)\.")
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is not a mapping)
                match = numbered.search(name)
                if match and int(match[2]) > layer:
                    start, end = match.span(2)
                    yield f"{name[:start]}{int(match[2]) - layer - 1}{name[end:]}", tensors.get_tensor(name)
                elif not match and _outside_layers(name, row, tied=config.tie_word_embeddings):
                    yield name, tensors.get_tensor(name)


def _outside_layers(name: str, row: Architecture, *, tied: bool) -> bool:
    """Final norm and head; the embedding only where it is the head too; learned positions never."""
    parts = name.split(".")
    if row.positions is not None and _last(row.positions) in parts:
        return False
    return tied or _last(row.embedding) not in parts


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]
