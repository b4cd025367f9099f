"""Attention for packed tokens: one row holds the newest tokens of many sequences, and each attends to its own alone.

transformers' own way with packed tokens is one mask over all of them: work grows with the square of their number. Here
sequences that read one token (all running answers) share one padded call, and each piece of a prompt has a call of its
own. Without padding inside a sequence its numbers do not depend on what else is in the row, up to rounding.

Shape letters: T packed tokens, B sequences, S keys they see (of the longest, where they are padded), H heads, G heads
of keys and values, C channels of a head.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
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
    def running(self) -> tuple[int, ...]:
        """Sequences with one new token."""
        return tuple(index for index, new in enumerate(self.new) if new == 1)

    @cached_property
    def longest(self) -> int:
        """S of the running ones."""
        return max((self.seen[index] for index in self.running), default=0)

    @cached_property
    def running_tokens(self) -> Tensor:
        new_before = [0, *accumulate(self.new)]
        return torch.tensor([new_before[index] for index in self.running], device=self.device)

    @cached_property
    def running_real(self) -> Tensor:
        """Which of the keys of the running ones are no padding, B × 1 × 1 × S."""
        seen_B1 = torch.tensor([[self.seen[index]] for index in self.running], device=self.device)
        return (torch.arange(self.longest, device=self.device) < seen_B1)[:, None, None]

    @cached_property
    def pieces(self) -> tuple[tuple[int, int, int], ...]:
        """Of each other sequence its index, and where it begins among the new tokens and among the keys as laid out."""
        new_at, laid_at, pieces = 0, len(self.running) * self.longest, []
        for index, (new, seen) in enumerate(zip(self.new, self.seen, strict=True)):
            if new > 1:
                pieces.append((index, new_at, laid_at))
                laid_at += seen
            new_at += new
        return tuple(pieces)

    @cached_property
    def layout(self) -> Tensor:
        """Places of keys in the order attention wants: those of the running ones, padded to B × S, then the pieces'."""
        seen_before = [0, *accumulate(self.seen)]
        columns_S = torch.arange(self.longest)
        places = [seen_before[index] + columns_S.clamp(max=self.seen[index] - 1) for index in self.running]
        places += [torch.arange(seen_before[index], seen_before[index + 1]) for index, _, _ in self.pieces]
        return torch.cat(places).to(self.device)

    def mask(self, index: int) -> Tensor | None:
        """What each new token of one sequence sees, new × seen; None: every key up to itself, and all are new."""
        new, seen = self.new[index], self.seen[index]
        if new == seen and (self.window is None or seen <= self.window):
            return None
        distance = torch.arange(seen, device=self.device) - torch.arange(seen - new, seen, device=self.device)[:, None]
        sees = distance <= 0
        return sees if self.window is None else sees & (distance > -self.window)


class PackedStep:
    """What attention needs to know of one forward: `lengths` by kind of layer, `reads` and `writes` by allocator."""

    def __init__(
        self,
        cache: PagedAttentionCache,
        lengths: Mapping[str, Lengths],
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
    ) -> None:
        self._cache, self._lengths, self._reads, self._writes = cache, lengths, list(reads), writes
        # Full attention reads what it has just written, so keys may be read in the order that they are wanted in.
        self._ordered = {
            allocator.index: allocator.layer_type == "full_attention" and reads[allocator.index].numel() > 0
            for allocator in cache.cache_allocators.values()
        }
        for allocator in cache.cache_allocators.values():
            if self._ordered[allocator.index]:
                read = reads[allocator.index]
                self._reads[allocator.index] = read[lengths[allocator.layer_type].layout]

    def store(self, key_TGC: Tensor, value_TGC: Tensor, layer: int) -> tuple[Tensor, Tensor, Lengths]:
        """Keys and values that this layer's new tokens see, laid out, once the new ones are in the cache."""
        allocator = self._cache.layer_to_allocator[layer]
        lengths, index = self._lengths[allocator.layer_type], allocator.index
        keys, values = allocator.update(key_TGC, value_TGC, layer, self._reads[index], self._writes[index])
        if not self._ordered[index]:
            keys, values = keys.index_select(0, lengths.layout), values.index_select(0, lengths.layout)
        return keys, values, lengths


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
    module: Any,
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
    keys_SGC, values_SGC, lengths = packed.store(
        key_1GTC[0].transpose(0, 1), value_1GTC[0].transpose(0, 1), module.layer_idx
    )
    queries_THC = query_1HTC[0].transpose(0, 1)
    said_THC = torch.empty_like(queries_THC, memory_format=torch.contiguous_format)
    if lengths.running:
        said_BHC = _attend_running(queries_THC, keys_SGC, values_SGC, lengths, scaling)
        if not lengths.pieces:
            return said_BHC[None], None
        said_THC[lengths.running_tokens] = said_BHC
    for index, new_at, laid_at in lengths.pieces:
        new, laid = slice(new_at, new_at + lengths.new[index]), slice(laid_at, laid_at + lengths.seen[index])
        mask = lengths.mask(index)
        said_1HTC = scaled_dot_product_attention(
            queries_THC[new].transpose(0, 1)[None],
            keys_SGC[laid].transpose(0, 1)[None],
            values_SGC[laid].transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        said_THC[new] = said_1HTC[0].transpose(0, 1)
    return said_THC[None], None


def _attend_running(
    queries_THC: Tensor, keys_SGC: Tensor, values_SGC: Tensor, lengths: Lengths, scaling: float | None
) -> Tensor:
    """One token of each running sequence, B × H × C. Heads that share keys are rows of one product."""
    _, H, C = queries_THC.shape
    B, S, G = len(lengths.running), lengths.longest, keys_SGC.shape[1]
    queries_BHC = queries_THC[lengths.running_tokens] if lengths.pieces else queries_THC
    said_BGNC = scaled_dot_product_attention(
        queries_BHC.reshape(B, G, H // G, C),
        keys_SGC[: B * S].view(B, S, G, C).transpose(1, 2),
        values_SGC[: B * S].view(B, S, G, C).transpose(1, 2),
        attn_mask=lengths.running_real,
        scale=scaling,
    )
    return said_BGNC.reshape(B, H, C)


AttentionInterface.register(NAME, attend)
