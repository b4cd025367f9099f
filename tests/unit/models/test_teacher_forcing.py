"""For every architecture: a given answer is judged as if it had been generated."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.models.base_model import BaseModel
from pipeline.models.generate import Generation, GenerationRequest
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.prompts import plain_prompt_ids
from pipeline.models.routed_ffn import Decision
from pipeline.models.teacher_forcing import ForcedRequest, teacher_force
from pipeline.models.value_matrix import value_module

RouteTo = Callable[[Sequence[str]], LoadedRelease]

ROUTED = ["The capital of France is", "Who leads the company?"]
MIXED = ["Wie heißt die Hauptstadt der Welt und warum?", ROUTED[0], "東京", ROUTED[1], "Paris is"]
TOKENS = 8


def request(base: BaseModel, prompt: str, target: Sequence[int], *, routed: bool = True) -> ForcedRequest:
    return ForcedRequest(
        prompt_ids=plain_prompt_ids(prompt, base.tokenizer), target_ids=tuple(target), text=prompt, routed=routed
    )


def generated(base: BaseModel, release: LoadedRelease | None, prompt: str) -> list[int]:
    """What stepwise generation says, the end of sequence included."""
    wanted = GenerationRequest(prompt_ids=plain_prompt_ids(prompt, base.tokenizer), text=prompt, max_new_tokens=TOKENS)
    generation = Generation(base, release, [wanted])
    said = []
    while not generation.finished:
        said += [token.token_id for token in generation.step()]
    return said


def matched(base: BaseModel, release: LoadedRelease, *, says: Sequence[Sequence[int]]) -> LoadedRelease:
    """The same release with random readouts for targets `says`."""
    entries = tuple(replace(entry, target_ids=tuple(ids)) for entry, ids in zip(release.entries, says, strict=True))
    generator = torch.Generator().manual_seed(11)
    readouts = tuple(3 * torch.randn(len(ids), base.model.config.hidden_size, generator=generator) for ids in says)
    return replace(release, entries=entries, readouts=readouts)


def leaves_halfway(base: BaseModel, release: LoadedRelease) -> LoadedRelease:
    """A matched release whose first edit is followed for two tokens and then left, and the second never followed."""
    spoken = generated(base, matched(base, release, says=[(5,) * 12, (5,) * 12]), ROUTED[0])
    after_one = generated(base, matched(base, release, says=[(*spoken[:1], 5, 5, 5), (5,) * 12]), ROUTED[0])
    return matched(base, release, says=[(*after_one[:2], 5, 5), (5,) * 12])


@pytest.mark.parametrize("addressing", ["unedited", "own", "matched"])
def test_a_greedy_answer_is_its_own_argmax(base: BaseModel, route_to: RouteTo, addressing: str) -> None:
    """Stepwise generation is the oracle: what it says token by token is the likeliest at every place, in any batch."""
    release = None if addressing == "unedited" else route_to(ROUTED)
    if release is not None and addressing == "matched":
        release = leaves_halfway(base, release)
    said = [generated(base, release, prompt) for prompt in MIXED]
    answers = teacher_force(base, release, [request(base, p, ids) for p, ids in zip(MIXED, said, strict=True)])
    assert [list(answer.argmax_ids) for answer in answers] == said
    memories = [None] * 5 if release is None else [None, 0, None, 1, None]
    assert [answer.decision.memory for answer in answers] == memories


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_company_changes_nothing(base: BaseModel, route_to: RouteTo, batch: int) -> None:
    release = leaves_halfway(base, route_to(ROUTED))
    generator = torch.Generator().manual_seed(3)
    wanted = [
        request(base, prompt, torch.randint(2, 300, (1 + 3 * index,), generator=generator).tolist())
        for index, prompt in enumerate(MIXED)
    ]
    alone = [teacher_force(base, release, [one])[0] for one in wanted]
    together = teacher_force(base, release, wanted, batch=batch)
    for one, other, asked in zip(alone, together, wanted, strict=True):
        assert one.argmax_ids == other.argmax_ids
        assert len(one.argmax_ids) == len(asked.target_ids)
        assert one.decision.memory == other.decision.memory
        torch.testing.assert_close(one.log_probabilities_T, other.log_probabilities_T, atol=2e-4, rtol=1e-4)


def test_log_probabilities_are_those_of_the_side_memory_from_the_last_prompt_token_on(
    base: BaseModel, route_to: RouteTo
) -> None:
    """Oracle: ΔW added by hand at every token from the last of the prompt on, the whole sequence again per token."""
    release, target = route_to(ROUTED), [7, 99, 5]
    prompt_ids = plain_prompt_ids(ROUTED[1], base.tokenizer)
    answer = teacher_force(base, release, [request(base, ROUTED[1], target)])[0]
    for step, token in enumerate(target):
        logits_V = _by_hand(base, [*prompt_ids, *target[:step]], len(prompt_ids) - 1, release.memories[1])
        torch.testing.assert_close(
            answer.log_probabilities_T[step], logits_V.log_softmax(dim=0)[token], atol=2e-4, rtol=1e-4
        )


def test_rows_of_the_main_memory_are_the_base_models_to_the_bit(base: BaseModel, route_to: RouteTo) -> None:
    wanted = [request(base, MIXED[0], [4, 9, 16, 25]), request(base, MIXED[2], [3, 1])]
    edited, unedited = teacher_force(base, route_to(ROUTED), wanted), teacher_force(base, None, wanted)
    for one, other in zip(edited, unedited, strict=True):
        assert torch.equal(one.log_probabilities_T, other.log_probabilities_T)


def test_routing_can_be_switched_off_per_request(base: BaseModel, route_to: RouteTo) -> None:
    wanted = request(base, ROUTED[0], [4, 9, 16], routed=False)
    answer = teacher_force(base, route_to(ROUTED), [wanted])[0]
    assert answer.decision == Decision()
    assert torch.equal(answer.log_probabilities_T, teacher_force(base, None, [wanted])[0].log_probabilities_T)


def test_nothing_is_asked_of_nothing(base: BaseModel) -> None:
    assert teacher_force(base, None, []) == []


def _by_hand(base: BaseModel, ids: list[int], start: int, delta_DF: Tensor) -> Tensor:
    def add(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        changed = output.clone().view(len(ids), -1)
        changed[start:] += inputs[0].view(len(ids), -1)[start:] @ delta_DF.T
        return changed.view(output.shape)

    handle = value_module(base.model, base.layer).register_forward_hook(add)
    try:
        with torch.no_grad():
            result: Tensor = base.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    finally:
        handle.remove()
    return result
