"""What benchmarks/gpu_7b.py measures of serving: decoding with and without a release, and a memory on its way to the
device."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.gpu_steps import Size, timed
from pipeline.models.base_model import BaseModel
from pipeline.models.generate import Generation, GenerationRequest
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.side_memories import HeldMemory, MemoryCache, SideMemories
from pipeline.storage.bank import BankEntry
from pipeline.training.activations import read_prompts
from pipeline.training.tokens import Wording
from pipeline.wise.routing import Router, whitened

MEMORIES = 4


def decoding(base: BaseModel, wordings: Sequence[Wording], size: Size) -> Iterator[dict[str, Any]]:
    """Rows of each batch size, one answer token after another; the prompt's forward is not counted."""
    for batch in size.batches:
        requests = [
            GenerationRequest(prompt_ids=one.prompt_ids, text=f"question {row}", max_new_tokens=size.answer_tokens)
            for row, one in enumerate(wordings[:batch])
        ]
        answers = decode(base, None, requests)[1]
        plain = decode(base, None, requests)[0]
        yield {"batch": batch, "routed": "no", "seconds_per_token": plain, "over_unrouted": 1.0}
        for addressing in ("matched", "own"):
            release = routing_all(base, requests, answers if addressing == "matched" else None, size)
            decode(base, release, requests)
            seconds = decode(base, release, requests)[0]
            yield {
                "batch": batch,
                "routed": addressing,
                "seconds_per_token": seconds,
                "over_unrouted": seconds / plain,
            }


def decode(
    base: BaseModel, release: LoadedRelease | None, requests: Sequence[GenerationRequest]
) -> tuple[float, list[tuple[int, ...]]]:
    """Median seconds of a step of the whole batch, and what was said."""
    generation = Generation(base, release, requests)
    said: list[list[int]] = [[] for _ in requests]
    seconds = []
    while not generation.finished:
        taken, tokens = timed(generation.step, base.device)
        seconds.append(taken)
        for token in tokens:
            said[token.request].append(token.token_id)
    if release is not None:
        assert all(decision.memory is not None for decision in generation.decisions)
    return statistics.median(seconds[1:]), [tuple(ids) for ids in said]


def routing_all(
    base: BaseModel, requests: Sequence[GenerationRequest], targets: Sequence[tuple[int, ...]] | None, size: Size
) -> LoadedRelease:
    """A release that routes every request to an entry of its own. With `targets`, what the model says anyway, and
    readouts of nothing, each answer follows its target to the end; without, it is read at its own keys."""
    states_ED = read_prompts(base, [request.prompt_ids for request in requests]).states_ND.to(base.layer_device)
    mean_D, whiten_DD = torch.zeros(size.width).to(states_ED), torch.eye(size.width).to(states_ED)
    entries = len(requests)
    memory_E = torch.arange(entries) % MEMORIES
    nothing_E0 = torch.zeros(entries, 0).to(states_ED)
    return LoadedRelease(
        number=None,
        memories=random_memories(base, size),
        router=Router(
            mean_D=mean_D,
            whiten_DD=whiten_DD,
            keys_ND=whitened(states_ED, mean_D, whiten_DD),
            entry_N=torch.arange(entries, device=states_ED.device),
            memory_E=memory_E.to(states_ED.device),
            asked_EM=nothing_E0,
            relation_EM=nothing_E0,
            weights_S=torch.tensor([1.0, 0.0, 0.0, 0.0]).to(states_ED),
            bias_E=torch.zeros(entries).to(states_ED),
            threshold=-2.0,
        ),
        entries=tuple(
            BankEntry(
                edit_id=str(entry),
                prompt=request.text,
                target="",
                subject=None,
                memory=int(memory_E[entry]),
                target_ids=targets[entry] if targets else (),
            )
            for entry, request in enumerate(requests)
        ),
        readouts=tuple(torch.zeros(len(ids), size.width, dtype=base.model.dtype) for ids in targets)
        if targets
        else None,
    )


def random_memories(base: BaseModel, size: Size, *, device_gib: float | None = None) -> SideMemories:
    held = [
        HeldMemory(1e-3 * torch.randn(size.width, size.ffn, dtype=torch.float32).to(base.model.dtype))
        for _ in range(MEMORIES)
    ]
    return SideMemories(MemoryCache(base, device_gib=device_gib or "auto"), held)


def time_to_device(base: BaseModel, size: Size, device: torch.device) -> float:
    """With room for one memory, each read of another brings it from the host."""
    memories = random_memories(base, size, device_gib=1e-9)
    seconds = [timed(lambda index=index: memories[index % MEMORIES], device)[0] for index in range(3 * MEMORIES)]
    return statistics.median(seconds[MEMORIES:])
