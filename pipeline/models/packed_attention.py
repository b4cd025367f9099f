"""Attention for packed tokens: one row holds the newest tokens of many sequences, and each attends to its own alone.

transformers' own way with packed tokens is one mask over all of them: work grows with the square of their number. Here
sequences that read one token (all running answers) share one padded call, and each piece of a prompt has a call of its
own. Without padding inside a sequence its numbers do not depend on what else is in the row, up to rounding.

Shape letters: T packed tokens, B sequences, S keys they see (of the longest, where they are padded), H heads, G heads
of keys and values, C channels of a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache

NAME = "wiseline_packed"  # unknown to transformers' masks, so models make none


@dataclass(frozen=True)
class Lengths:
    """Of each sequence in the row: how many new tokens it has, and how many keys they see, their own included."""

    new: tuple[int, ...]
    seen: tuple[int, ...]
    device: torch.device
    window: int | None  # sliding attention: a token sees so many keys at most

    @cached_property
    def starts(self) -> tuple[tuple[int, int], ...]:
        """Where each sequence begins among the new tokens, and among the keys."""
        new_at, seen_at, starts = 0, 0, []
        for new, seen in zip(self.new, self.seen, strict=True):
            starts.append((new_at, seen_at))
            new_at, seen_at = new_at + new, seen_at + seen
        return tuple(starts)

    @cached_property
    def running(self) -> tuple[int, ...]:
        """Sequences with one new token."""
        return tuple(index for index, new in enumerate(self.new) if new == 1)

    @cached_property
    def running_tokens(self) -> Tensor:
        return torch.tensor([self.starts[index][0] for index in self.running], device=self.device)

    @cached_property
    def running_keys(self) -> tuple[Tensor, Tensor]:
        """Places of their keys, B × S, and which of them are keys and no padding, B × 1 × 1 × S."""
        first_B1 = torch.tensor([[self.starts[index][1]] for index in self.running], device=self.device)
        seen_B1 = torch.tensor([[self.seen[index]] for index in self.running], device=self.device)
        columns_S = torch.arange(max(self.seen[index] for index in self.running), device=self.device)
        real_BS = columns_S < seen_B1
        return torch.where(real_BS, first_B1 + columns_S, first_B1), real_BS[:, None, None]

    def mask(self, index: int) -> Tensor | None:
        """What each new token of one sequence sees, new × seen; None: every key up to itself, and all are new."""
        new, seen = self.new[index], self.seen[index]
        if new == seen and (self.window is None or seen <= self.window):
            return None
        distance = torch.arange(seen, device=self.device) - torch.arange(seen - new, seen, device=self.device)[:, None]
        sees = distance <= 0
        return sees if self.window is None else sees & (distance > -self.window)


@dataclass(frozen=True)
class PackedStep:
    """What attention needs to know of one forward; `lengths`, `reads` and `writes` by kind of layer."""

    cache: PagedAttentionCache
    lengths: dict[str, Lengths]
    reads: Sequence[Tensor]
    writes: Sequence[Tensor]


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Forwards inside this block take a `packed` step; nothing is left behind."""
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: nn.Module,
    query_1HTC: Tensor,
    key_1GTC: Tensor,
    value_1GTC: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedStep,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Stores the new keys and values and attends; 1 × T × H × C."""
    allocator = packed.cache.layer_to_allocator[module.layer_idx]
    keys_SGC, values_SGC = allocator.update(
        key_1GTC[0].transpose(0, 1),
        value_1GTC[0].transpose(0, 1),
        module.layer_idx,
        packed.reads[allocator.index],
        packed.writes[allocator.index],
    )
    lengths = packed.lengths[allocator.layer_type]
    queries_THC = query_1HTC[0].transpose(0, 1)
    said_THC = torch.empty_like(queries_THC, memory_format=torch.contiguous_format)
    if lengths.running:
        said_BHC = _attend_running(queries_THC, keys_SGC, values_SGC, lengths, scaling)
        if len(lengths.running) == len(lengths.new):
            return said_BHC[None], None
        said_THC[lengths.running_tokens] = said_BHC
    for index, (new, seen) in enumerate(zip(lengths.new, lengths.seen, strict=True)):
        if new == 1:
            continue
        new_at, seen_at = lengths.starts[index]
        mask = lengths.mask(index)
        said_1HTC = scaled_dot_product_attention(
            queries_THC[new_at : new_at + new].transpose(0, 1)[None],
            keys_SGC[seen_at : seen_at + seen].transpose(0, 1)[None],
            values_SGC[seen_at : seen_at + seen].transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        said_THC[new_at : new_at + new] = said_1HTC[0].transpose(0, 1)
    return said_THC[None], None


def _attend_running(
    queries_THC: Tensor, keys_SGC: Tensor, values_SGC: Tensor, lengths: Lengths, scaling: float | None
) -> Tensor:
    """One token of each running sequence, B × H × C. Heads that share keys are rows of one product."""
    places_BS, real_B11S = lengths.running_keys
    _, H, C = queries_THC.shape
    B, G = len(lengths.running), keys_SGC.shape[1]
    said_BGNC = scaled_dot_product_attention(
        queries_THC[lengths.running_tokens].view(B, G, H // G, C),
        keys_SGC[places_BS].transpose(1, 2),
        values_SGC[places_BS].transpose(1, 2),
        attn_mask=real_B11S,
        scale=scaling,
    )
    return said_BGNC.reshape(B, H, C)


AttentionInterface.register(NAME, attend)
