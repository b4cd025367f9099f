"""What the routed model thinks of an answer that is given: teacher forcing, by the code that serves.

Prompt and answer go through the model in one forward. The routing decision is taken once, at the last prompt token, and
the side memory acts from there on; with `matched` addressing it follows the given answer's tokens as serving follows
those it generates. Rows that stay with the main memory give the base model's own logits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.base_model import BaseModel
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.routed_ffn import Decision, RoutedBatch

MOST_ANSWER_TOKENS = 2048  # in one batch; each of them has logits over the whole vocabulary


@dataclass(frozen=True, kw_only=True)
class ForcedRequest:
    """An answer to judge behind a prompt; neither is empty, and both fit the model's context together. `text` is what
    the router's text signals read."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    text: str
    routed: bool = True


@dataclass(frozen=True)
class ForcedAnswer:
    """Per token of the answer: which token was the likeliest there, and how likely the given one was."""

    argmax_ids: tuple[int, ...]
    log_probabilities_T: Tensor  # natural logarithms, float32 on the CPU
    decision: Decision

    def agrees(self, target_ids: Sequence[int]) -> list[bool]:
        """Is the likeliest token the given one? One answer per token."""
        return [likeliest == given for likeliest, given in zip(self.argmax_ids, target_ids, strict=True)]


def teacher_force(
    base: BaseModel, release: LoadedRelease | None, requests: Sequence[ForcedRequest], *, batch: int = 32
) -> list[ForcedAnswer]:
    """Every request's answer, in their order. Neighbours in length share a batch."""
    answers: dict[int, ForcedAnswer] = {}
    for chosen in _batches(requests, most_rows=batch):
        answers |= zip(chosen, _force_batch(base, release, [requests[index] for index in chosen]), strict=True)
    return [answers[index] for index in range(len(requests))]


def _batches(requests: Sequence[ForcedRequest], *, most_rows: int) -> Iterator[list[int]]:
    """Indices of requests that go together, the longest answer of a batch deciding how many fit."""
    by_length = sorted(
        range(len(requests)), key=lambda index: (len(requests[index].target_ids), len(requests[index].prompt_ids))
    )
    batch: list[int] = []
    for index in by_length:
        columns = len(requests[index].target_ids)
        if batch and (len(batch) == most_rows or (len(batch) + 1) * columns > MOST_ANSWER_TOKENS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def _force_batch(
    base: BaseModel, release: LoadedRelease | None, requests: Sequence[ForcedRequest]
) -> list[ForcedAnswer]:
    """Rows are laid out as [left padding | prompt | answer without its last token | right padding], the prompts' last
    tokens in one column. Causal attention keeps the right padding from being seen."""
    assert all(request.prompt_ids and request.target_ids for request in requests)
    P = max(len(request.prompt_ids) for request in requests)
    T = max(len(request.target_ids) for request in requests)
    pad = base.tokenizer.pad_token_id
    given = [[*request.target_ids[:-1], *[pad] * (T - len(request.target_ids))] for request in requests]
    ids_BS = torch.tensor(
        [
            [*[pad] * (P - len(request.prompt_ids)), *request.prompt_ids, *tokens]
            for request, tokens in zip(requests, given, strict=True)
        ]
    )
    mask_BS = torch.zeros_like(ids_BS)
    for row, request in enumerate(requests):
        mask_BS[row, P - len(request.prompt_ids) : P + len(request.target_ids) - 1] = 1
    routed = RoutedBatch(
        base,
        release,
        texts=[request.text for request in requests],
        routed=[request.routed for request in requests],
        given=given,
        prompt_tokens=[len(request.prompt_ids) for request in requests],
    )
    with routed.installed():
        output = base.model(
            input_ids=ids_BS.to(base.device),
            attention_mask=mask_BS.to(base.device),
            position_ids=(mask_BS.cumsum(dim=1) - 1).clamp(min=0).to(base.device),
            use_cache=False,
            logits_to_keep=T,
        )
    return [
        _answer(logits_TV, request, decision)
        for logits_TV, request, decision in zip(output.logits, requests, routed.decisions, strict=True)
    ]


def _answer(logits_TV: Tensor, request: ForcedRequest, decision: Decision) -> ForcedAnswer:
    logits_TV = logits_TV[: len(request.target_ids)].float()
    target_T1 = torch.tensor(request.target_ids, device=logits_TV.device)[:, None]
    return ForcedAnswer(
        argmax_ids=tuple(logits_TV.argmax(dim=1).tolist()),
        log_probabilities_T=logits_TV.log_softmax(dim=1).gather(1, target_T1)[:, 0].cpu(),
        decision=decision,
    )
