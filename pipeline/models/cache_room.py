"""How large the cache of keys and values is: bounded, and never too small for one whole context."""

import os
from math import ceil
from typing import Any, Literal

import torch

from pipeline.errors import ConfigError
from pipeline.models.base_model import BaseModel

PAGE_TOKENS = 16  # what a sequence takes from the cache at a time
SHARE_OF_FREE = 0.25  # `auto`: the rest is for side memories, activations and whoever else is on the machine
GIB = 2**30


def cache_pages(base: BaseModel, *, sequences: int, gib: float | Literal["auto"]) -> int:
    """Pages for `sequences` answers. `auto`: a whole context for each, as far as a quarter of the free memory goes.

    Raises ConfigError when one whole context does not fit."""
    page_bytes = PAGE_TOKENS * _bytes_per_token(base)
    context = ceil(base.max_tokens / PAGE_TOKENS)
    room = SHARE_OF_FREE * _free_bytes(base.device) if gib == "auto" else gib * GIB
    pages = min(int(room / page_bytes), sequences * context)
    if pages < context:
        raise ConfigError(
            f"Keys and values of one context of {base.max_tokens} tokens take {context * page_bytes / GIB:.2g} GiB, "
            f"and {room / GIB:.2g} GiB are theirs; raise serve.cache_gib or serve a model with a smaller context."
        )
    return pages


def _bytes_per_token(base: BaseModel) -> int:
    config: Any = base.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values: int = config.num_hidden_layers * heads * channels
    return 2 * values * int(base.model.dtype.itemsize)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
