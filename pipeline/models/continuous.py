"""Continuous batching: transformers' scheduler and paged cache, driven one step at a time by whoever calls `step`.

A step reads what fits into `step_tokens`: one token of every running answer first, then pieces of prompts. Answers join
and leave between steps. When the cache is full the newest answers lose their place and are read again later, prompt and
answer. Of transformers' continuous batching the scheduler, the cache and the batch's tensors are used; its thread, its
queues and its sampling are not, so a failing forward harms nothing but the answers that run, and an answer samples here
exactly as in `generate.py`. These parts are internal to transformers: `tests/unit/models/test_continuous.py` holds that
every mix of requests gives each what it gets alone.

Prefixes are not shared between requests: from the last prompt token on keys and values above layer L are a release's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import RequestState
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput

from pipeline.models.base_model import BaseModel
from pipeline.models.cache_room import PAGE_TOKENS
from pipeline.models.generate import LEAST_TEMPERATURE, GenerationRequest, Token, chooser, logprobs_of
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.packed_attention import Lengths, PackedStep, packed_attention
from pipeline.models.packed_routing import Piece, RoutedSequence, routed
from pipeline.models.routed_ffn import Decision


def can_batch_continuously(base: BaseModel) -> bool:
    """Whether this model computes attention through transformers' interface (GPT-J does not), on one device."""
    return bool(base.model._supports_attention_backend) and len(_devices(base)) < 2


@dataclass
class _Running:
    request: GenerationRequest
    sequence: RoutedSequence
    left: int
    choose: Callable[[Tensor], int] | None  # None: greedy
    finished: bool = False


class ContinuousBatching:
    """Answers of many requests, each with a release of its own. One thread may use it.

    `pages`: size of the cache, in pages of 16 tokens; it must hold one whole context. `sequences`: how many may run.
    """

    def __init__(self, base: BaseModel, *, sequences: int, step_tokens: int, pages: int) -> None:
        self._base, self._pages = base, pages
        self._running: dict[int, _Running] = {}
        limits = ContinuousBatchingConfig(
            num_blocks=pages,
            page_size=PAGE_TOKENS,
            max_batch_tokens=max(step_tokens, sequences),
            max_requests_per_batch=sequences,
            max_memory_percent=0.99,  # the size is ours; transformers only refuses more than there is
            allow_block_sharing=False,
            use_cuda_graph=False,
            use_async_batching=False,
            auto_switch_to_flash=False,
            max_blocks_per_request=0,
        )
        ends = list(base.end_ids) or [-1]
        manager = ContinuousBatchingManager(base.model, GenerationConfig(eos_token_id=ends, do_sample=False), limits)
        with packed_attention(base.model):
            self._processor = manager._create_batch_processor()
        self._processor.output_router = _Nobody()
        self._scheduler: Any = self._processor.scheduler

    def add(self, key: int, request: GenerationRequest, release: LoadedRelease | None) -> None:
        """`request` runs from the next step on; its tokens carry `key`, which no other may have had."""
        total = len(request.prompt_ids) + request.max_new_tokens
        assert request.prompt_ids and request.max_new_tokens > 0 and total <= self._pages * PAGE_TOKENS
        greedy = request.temperature < LEAST_TEMPERATURE
        self._running[key] = _Running(
            request=request,
            sequence=RoutedSequence(self._base, release, request),
            left=request.max_new_tokens,
            choose=None if greedy else chooser(request, self._base.device),
        )
        state = RequestState(
            request_id=str(key),
            initial_tokens=list(request.prompt_ids),
            max_new_tokens=request.max_new_tokens,
            eos_token_id=list(self._base.end_ids),
        )
        self._scheduler.add_waiting_request(state)

    def remove(self, key: int) -> None:
        """The request yields nothing more; its place in the cache is free at the next step."""
        if self._running.pop(key).finished:
            return
        self._scheduler.set_request_cancellation(str(key))
        # Set when answers lose their place, and cleared when one finishes: without this they might wait for ever.
        self._scheduler.block_new_requests = False

    def decision(self, key: int) -> Decision:
        """Known from the request's first token on, until its last."""
        decision = self._running[key].sequence.decision
        assert decision is not None
        return decision

    def reset(self) -> None:
        """Forgets all requests: what to do after a step that raised."""
        self._running.clear()
        self._processor.reset()

    @torch.no_grad()
    def step(self) -> list[Token]:
        """The next token of every request whose prompt is read; none when prompts alone were read."""
        if not self._processor.prepare_next_batch():
            assert not self._running, "requests wait, and none of them can be scheduled"
            return []
        tensors: Any = self._processor.inputs_and_outputs
        batch: Sequence[FutureRequestState] = tensors.requests_in_batch
        speaking = [int(future.state.request_id) for future in batch if future.has_new_token]
        logits_BV = self._forward(tensors, batch, speaking=len(speaking))
        chosen = self._choose(speaking, logits_BV)
        tensors.output_ids[0, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        self._processor.update_batch()
        return [self._token(*row) for row in zip(speaking, chosen, logits_BV, strict=True)]

    def _forward(self, tensors: ContinuousBatchingIOs, batch: Sequence[FutureRequestState], *, speaking: int) -> Tensor:
        """Logits B × V at the newest token of every request whose prompt is read."""
        inputs: Mapping[str, Any] = tensors.get_model_kwargs()
        packed = _packed_step(inputs, [future.query_length for future in batch], self._base)
        with packed_attention(self._base.model), routed(self._base, self._pieces(batch)):
            output = self._base.model(
                input_ids=inputs["input_ids"],
                position_ids=inputs["position_ids"],
                logits_to_keep=inputs["logits_indices"][:speaking],
                use_cache=False,
                packed=packed,
            )
        logits_BV: Tensor = output.logits[0].float()
        return logits_BV

    def _pieces(self, batch: Sequence[FutureRequestState]) -> list[Piece]:
        pieces, start = [], 0
        for future in batch:
            sequence = self._running[int(future.state.request_id)].sequence
            first = future.state.position_offset - future.query_length  # the scheduler has already moved on
            pieces.append(Piece(sequence=sequence, start=start, first=first, count=future.query_length))
            start += future.query_length
        return pieces

    def _choose(self, speaking: Sequence[int], logits_BV: Tensor) -> list[int]:
        chosen: list[int] = logits_BV.argmax(dim=1).tolist()
        for row, key in enumerate(speaking):
            choose = self._running[key].choose
            if choose is not None:
                chosen[row] = choose(logits_BV[row])
        return chosen

    def _token(self, key: int, token_id: int, logits_V: Tensor) -> Token:
        running = self._running[key]
        running.sequence.say(token_id)
        running.left -= 1
        finish: Literal["stop", "length"] | None = None
        if token_id in self._base.end_ids:
            finish = "stop"
        elif running.left <= 0:
            finish = "length"
        running.finished = finish is not None
        logprob, top = logprobs_of(logits_V, token_id, running.request.logprobs)
        return Token(request=key, token_id=token_id, finish=finish, logprob=logprob, top=top)


class _Nobody:
    """Takes what transformers would deliver: tokens are given out by `step`, and a refusal is a mistake of ours."""

    def deliver_batch(self, outputs: Sequence[GenerationOutput]) -> None:
        pass

    def fail_and_deliver(self, state: RequestState, error: Exception) -> None:
        raise error


def _packed_step(inputs: Mapping[str, Any], new: Sequence[int], base: BaseModel) -> PackedStep:
    lengths = {
        kind: Lengths(
            new=tuple(new),
            seen=tuple(starts.diff().tolist()),
            device=base.device,
            window=base.model.config.sliding_window if kind == "sliding_attention" else None,
        )
        for kind, starts in inputs["cu_seq_lens_k"].items()
    }
    return PackedStep(cache=inputs["cache"], lengths=lengths, reads=inputs["read_index"], writes=inputs["write_index"])


def _devices(base: BaseModel) -> set[str]:
    return {str(device) for device in (getattr(base.model, "hf_device_map", None) or {}).values()}
