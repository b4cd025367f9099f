"""For every architecture: Δ_act decides once per sequence, whatever the company, and the memory acts on every token."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pipeline.models.base_model import BaseModel
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.prompts import plain_prompt_ids
from pipeline.models.value_matrix import value_module
from pipeline.wise.routing import empty_router

RouteTo = Callable[[Sequence[str]], LoadedRelease]

PROMPTS = ["Wie heißt die Hauptstadt der Welt und warum?", "The capital of France is", "東京", "Who leads the company?"]


def requests(base: BaseModel, prompts: Sequence[str], *, routed: bool = True) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            prompt_ids=plain_prompt_ids(prompt, base.tokenizer), text=prompt, max_new_tokens=8, routed=routed
        )
        for prompt in prompts
    ]


def run(base: BaseModel, ids: Sequence[int], delta_DF: Tensor | None) -> tuple[Tensor, Tensor]:
    """Oracle: one sequence through the whole model, ΔW at every token. The last logits and A(x) T × F."""
    seen: list[Tensor] = []

    def add(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(inputs[0].reshape(len(ids), -1))
        return output if delta_DF is None else output + inputs[0] @ delta_DF.T

    handle = value_module(base.model, base.layer).register_forward_hook(add)
    try:
        with torch.no_grad():
            logits: Tensor = base.model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    finally:
        handle.remove()
    return logits, seen[0]


def strengths(base: BaseModel, release: LoadedRelease, prompt: str) -> list[float]:
    """Δ_act in each memory, a norm and a mean at a time."""
    _, keys_TF = run(base, plain_prompt_ids(prompt, base.tokenizer), None)
    return [sum(float((delta_DF @ key_F).norm()) for key_F in keys_TF) / len(keys_TF) for delta_DF in release.memories]


@pytest.fixture
def release(base: BaseModel, route_to: RouteTo) -> LoadedRelease:
    """ε of both memories lies in the largest gap between the prompts, so that some are routed and some are not."""
    plain = route_to(PROMPTS)
    strongest = sorted(max(strengths(base, plain, prompt)) for prompt in PROMPTS)
    low, high = max(pairwise(strongest), key=lambda pair: pair[1] - pair[0])
    router = empty_router(int(base.model.config.hidden_size))
    return replace(plain, router=router, thresholds=((low + high) / 2,) * 2, whole_prompt=True)


def expected(base: BaseModel, release: LoadedRelease, prompt: str) -> int | None:
    assert release.thresholds is not None
    in_memory = strengths(base, release, prompt)
    best = max(range(2), key=in_memory.__getitem__)
    return best if in_memory[best] > release.thresholds[best] else None


def test_decisions_follow_the_definition_in_any_company(base: BaseModel, release: LoadedRelease) -> None:
    wanted = [expected(base, release, prompt) for prompt in PROMPTS]
    assert None in wanted and any(memory is not None for memory in wanted)
    for batch in (1, 2, len(PROMPTS)):
        _, decisions = generate(base, release, requests(base, PROMPTS), batch=batch)
        assert [decision.memory for decision in decisions] == wanted
        for prompt, decision in zip(PROMPTS, decisions, strict=True):
            assert decision.score == pytest.approx(max(strengths(base, release, prompt)), rel=1e-4)


def test_the_side_memory_acts_on_every_token_and_the_decision_is_held(base: BaseModel, release: LoadedRelease) -> None:
    answers, _ = generate(base, release, requests(base, PROMPTS))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        memory = expected(base, release, prompt)
        delta_DF = None if memory is None else release.memories[memory]
        prompt_ids = plain_prompt_ids(prompt, base.tokenizer)
        said: list[int] = []
        while len(said) < 8:
            token = int(run(base, [*prompt_ids, *said], delta_DF)[0].argmax())
            if token in base.end_ids:
                break
            said.append(token)
        assert answer == base.tokenizer.decode(said, skip_special_tokens=True).strip()


def test_an_answer_is_the_same_alone_and_in_a_batch(base: BaseModel, release: LoadedRelease) -> None:
    together, _ = generate(base, release, requests(base, PROMPTS))
    assert together == [generate(base, release, [request])[0][0] for request in requests(base, PROMPTS)]


def test_routing_can_be_switched_off(base: BaseModel, release: LoadedRelease) -> None:
    answers, decisions = generate(base, release, requests(base, PROMPTS, routed=False))
    assert answers == generate(base, None, requests(base, PROMPTS))[0]
    assert all(decision.memory is None for decision in decisions)
