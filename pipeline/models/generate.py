"""Routed generation of one batch, a step at a time: the same code evaluates, serves and answers offline."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.models.base_model import BaseModel
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.routed_ffn import Decision, RoutedBatch

LEAST_TEMPERATURE = 1e-4  # below it sampling is greedy anyway, and dividing logits by it overflows


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """`text` is what the router's text signals read; temperature 0 is greedy; `top_k` 0 keeps every token. `logprobs`:
    how many of the likeliest tokens to report beside the chosen one, at every step; None: nothing."""

    prompt_ids: tuple[int, ...]
    text: str
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    routed: bool = True
    logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """One step of one request. The end-of-sequence token arrives with finish "stop" and is not to be shown.

    `logprob` and `top` (token id and log-probability, the likeliest first; natural logarithms) are of the answering
    memory's own distribution, before temperature, top_k and top_p; only where the request asked for them."""

    request: int
    token_id: int
    finish: Literal["stop", "length"] | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Generation:
    """One batch. It holds one release for its whole life; each sequence is routed once, at the first step.

    Rows are padded on the left, and finished rows leave the batch, so a request gets the same greedy tokens in any
    company as alone (up to the rounding of the dtype).
    """

    def __init__(self, base: BaseModel, release: LoadedRelease | None, requests: Sequence[GenerationRequest]) -> None:
        assert requests and all(request.prompt_ids for request in requests)
        self._base, self._requests = base, requests
        self._routed = RoutedBatch(
            base,
            release,
            texts=[request.text for request in requests],
            routed=[request.routed for request in requests],
            prompt_tokens=[len(request.prompt_ids) for request in requests],
        )
        self._cache = DynamicCache(config=base.model.config)
        self._rows = list(range(len(requests)))  # requests still running, in batch order
        self._left = [request.max_new_tokens for request in requests]
        self._cancelled: set[int] = set()
        self._choosers = [chooser(request, base.device) for request in requests]
        self._ids_BT, self._mask_BS = _left_padded(base, requests)

    @property
    def decisions(self) -> list[Decision]:
        """One per request; empty before the first step."""
        return self._routed.decisions

    @property
    def finished(self) -> bool:
        return not self._rows

    def cancel(self, request: int) -> None:
        """The request yields no further token and leaves the batch at the next step."""
        self._cancelled.add(request)

    @torch.no_grad()
    def step(self) -> list[Token]:
        """One token for every running request."""
        logits_BV = self._forward()
        tokens = []
        for row, request in enumerate(self._rows):
            if request in self._cancelled:
                continue
            token_id = self._choosers[request](logits_BV[row])
            self._left[request] -= 1
            finish: Literal["stop", "length"] | None = None
            if token_id in self._base.end_ids:
                finish = "stop"
            elif self._left[request] <= 0:
                finish = "length"
            logprob, top = logprobs_of(logits_BV[row], token_id, self._requests[request].logprobs)
            tokens.append(Token(request=request, token_id=token_id, finish=finish, logprob=logprob, top=top))
        self._go_on_with([token for token in tokens if token.finish is None])
        return tokens

    def _forward(self) -> Tensor:
        """Logits B × V of the newest column."""
        positions_BS = (self._mask_BS.cumsum(dim=1) - 1).clamp(min=0)
        with self._routed.installed():
            output = self._base.model(
                input_ids=self._ids_BT,
                attention_mask=self._mask_BS,
                position_ids=positions_BS[:, -self._ids_BT.shape[1] :],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits_BV: Tensor = output.logits[:, -1].to(self._base.device, torch.float32)
        return logits_BV

    def _go_on_with(self, tokens: Iterable[Token]) -> None:
        newest = {token.request: token.token_id for token in tokens}
        kept = [row for row, request in enumerate(self._rows) if request in newest]
        dropped = len(kept) < len(self._rows)
        self._rows = [self._rows[row] for row in kept]
        if not kept:
            return
        if dropped:
            index = torch.tensor(kept)  # on the CPU: layers may lie on several GPUs
            self._cache.batch_select_indices(index)
            self._mask_BS = self._mask_BS[index]
        read_next = [newest[request] for request in self._rows]
        self._routed.go_on(kept, read_next)
        self._ids_BT = torch.tensor(read_next, device=self._base.device)[:, None]
        self._mask_BS = torch.cat([self._mask_BS, torch.ones_like(self._ids_BT)], dim=1)


def generate(
    base: BaseModel, release: LoadedRelease | None, requests: Sequence[GenerationRequest], *, batch: int = 32
) -> tuple[list[str], list[Decision]]:
    """Answers (stripped text) and decisions of all requests. Neighbours in length share a batch."""
    answers, decisions = [""] * len(requests), [Decision()] * len(requests)
    by_length = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids))
    for start in range(0, len(by_length), batch):
        chosen = by_length[start : start + batch]
        generation = Generation(base, release, [requests[index] for index in chosen])
        ids: list[list[int]] = [[] for _ in chosen]
        while not generation.finished:
            for token in generation.step():
                if token.finish != "stop":
                    ids[token.request].append(token.token_id)
        for position, index in enumerate(chosen):
            answers[index] = base.tokenizer.decode(ids[position], skip_special_tokens=True).strip()
            decisions[index] = generation.decisions[position]
    return answers, decisions


def logprobs_of(
    logits_V: Tensor, token_id: int, alternatives: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """The chosen token's log-probability, and the likeliest tokens with theirs; nothing if `alternatives` is None."""
    if alternatives is None:
        return None, ()
    logprobs_V = logits_V.float().log_softmax(dim=-1)
    values, ids = logprobs_V.topk(min(alternatives, len(logprobs_V)))
    return float(logprobs_V[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True))


def _left_padded(base: BaseModel, requests: Sequence[GenerationRequest]) -> tuple[Tensor, Tensor]:
    longest = max(len(request.prompt_ids) for request in requests)
    ids_BT = torch.full((len(requests), longest), base.tokenizer.pad_token_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, request in enumerate(requests):
        ids_BT[row, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask_BT[row, longest - len(request.prompt_ids) :] = 1
    return ids_BT.to(base.device), mask_BT.to(base.device)


def chooser(request: GenerationRequest, device: torch.device) -> Callable[[Tensor], int]:
    """Picks the next token of one request: greedy, or sampled from its own seeded generator."""
    if request.temperature < LEAST_TEMPERATURE:
        return lambda logits_V: int(logits_V.argmax())
    warp = LogitsProcessorList([TemperatureLogitsWarper(request.temperature)])
    if request.top_k > 0:
        warp.append(TopKLogitsWarper(request.top_k))
    if request.top_p < 1:
        warp.append(TopPLogitsWarper(request.top_p))
    generator = torch.Generator(device=device)
    if request.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.seed)

    def sample(logits_V: Tensor) -> int:
        scores_1V = warp(None, logits_V[None])
        return int(torch.multinomial(scores_1V.softmax(dim=-1), 1, generator=generator))

    return sample
