"""For every architecture: routing touches exactly the rows and tokens it should, and nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.models.base_model import BaseModel
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.prompts import plain_prompt_ids
from pipeline.models.routed_ffn import RoutedBatch
from pipeline.models.value_matrix import value_module

RouteTo = Callable[[Sequence[str]], LoadedRelease]

ROUTED = ["The capital of France is", "Who leads the company?"]
UNROUTED = ["Wie heißt die Hauptstadt der Welt und warum?", "東京", "Paris is"]
MIXED = [UNROUTED[0], ROUTED[0], UNROUTED[1], ROUTED[1], UNROUTED[2]]


def requests(base: BaseModel, prompts: Sequence[str], *, routed: bool = True) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            prompt_ids=plain_prompt_ids(prompt, base.tokenizer), text=prompt, max_new_tokens=12, routed=routed
        )
        for prompt in prompts
    ]


def logits(base: BaseModel, prompt: str, release: LoadedRelease | None) -> Tensor:
    batch = RoutedBatch(base, release, texts=[prompt], routed=[True])
    with torch.no_grad(), batch.installed():
        output: Tensor = base.model(torch.tensor([plain_prompt_ids(prompt, base.tokenizer)])).logits
    return output


def test_before_any_release_the_logits_are_the_base_models(base: BaseModel) -> None:
    """Oracle: the model loaded by transformers alone, and its own `generate` on a padded batch."""
    alone = AutoModelForCausalLM.from_pretrained(base.model.config._name_or_path, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = alone(torch.tensor([plain_prompt_ids(ROUTED[0], base.tokenizer)])).logits
    assert torch.equal(logits(base, ROUTED[0], None), plain)
    for prompt, answer in zip(MIXED, generate(base, None, requests(base, MIXED))[0], strict=True):
        ids = torch.tensor([plain_prompt_ids(prompt, base.tokenizer)])
        whole = alone.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=list(base.end_ids), pad_token_id=1)
        assert answer == base.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_an_unrouted_prompt_keeps_its_logits_to_the_bit(base: BaseModel, route_to: RouteTo) -> None:
    assert torch.equal(logits(base, UNROUTED[0], route_to(ROUTED)), logits(base, UNROUTED[0], None))


def test_the_side_memory_speaks_from_the_last_prompt_token_on(base: BaseModel, route_to: RouteTo) -> None:
    routed, plain = logits(base, ROUTED[0], route_to(ROUTED)), logits(base, ROUTED[0], None)
    assert torch.equal(routed[:, :-1], plain[:, :-1])
    assert not torch.allclose(routed[:, -1], plain[:, -1], atol=1e-2)


def test_nothing_is_left_behind_in_the_model(base: BaseModel, route_to: RouteTo) -> None:
    before = value_module(base.model, base.layer).weight.clone()
    plain = logits(base, ROUTED[0], None)
    generate(base, route_to(ROUTED), requests(base, MIXED))
    assert torch.equal(value_module(base.model, base.layer).weight, before)
    assert torch.equal(logits(base, ROUTED[0], None), plain)


def test_a_mixed_batch_gives_each_prompt_its_own_answer(base: BaseModel, route_to: RouteTo) -> None:
    release = route_to(ROUTED)
    together, decisions = generate(base, release, requests(base, MIXED))
    alone = [generate(base, release, [request])[0][0] for request in requests(base, MIXED)]
    unedited, _ = generate(base, None, requests(base, MIXED))
    assert together == alone
    assert [decision.memory for decision in decisions] == [None, 0, None, 1, None]
    assert [a == b for a, b in zip(together, unedited, strict=True)] == [True, False, True, False, True]


def test_cached_generation_equals_uncached_generation(base: BaseModel, route_to: RouteTo) -> None:
    """Oracle: run the whole sequence again for every token, with the decision taken once at the prompt."""
    release = route_to(ROUTED)
    for prompt, memory in ((ROUTED[0], 0), (ROUTED[1], 1), (UNROUTED[0], None)):
        prompt_ids = plain_prompt_ids(prompt, base.tokenizer)
        ids = list(prompt_ids)
        while len(ids) < len(prompt_ids) + 12:
            logits_V = _uncached(base, ids, start=len(prompt_ids) - 1, delta=release, memory=memory)
            if int(logits_V.argmax()) in base.end_ids:
                break
            ids.append(int(logits_V.argmax()))
        wanted = base.tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True).strip()
        assert generate(base, release, requests(base, [prompt]))[0] == [wanted]


def test_routing_can_be_switched_off_per_request(base: BaseModel, route_to: RouteTo) -> None:
    answers, decisions = generate(base, route_to(ROUTED), requests(base, ROUTED, routed=False))
    assert answers == generate(base, None, requests(base, ROUTED))[0]
    assert all(decision.memory is None and decision.edit_id is None for decision in decisions)


def matched(base: BaseModel, release: LoadedRelease, *, says: Sequence[tuple[int, ...]]) -> LoadedRelease:
    """The same release with random readouts for targets `says`."""
    entries = tuple(replace(entry, target_ids=ids) for entry, ids in zip(release.entries, says, strict=True))
    generator = torch.Generator().manual_seed(11)
    readouts = tuple(3 * torch.randn(len(ids), base.model.config.hidden_size, generator=generator) for ids in says)
    return replace(release, entries=entries, readouts=readouts)


def follow(base: BaseModel, release: LoadedRelease, prompt: str, index: int) -> list[int]:
    """Oracle for matched addressing: the whole sequence again for every token, the readouts added by hand while the
    answer follows the target, ΔW from then on. Entry and memory are both `index`."""
    assert release.readouts is not None
    prompt_ids = plain_prompt_ids(prompt, base.tokenizer)
    target, readouts_TD = release.entries[index].target_ids, release.readouts[index]
    said: list[int] = []
    while len(said) < 12:
        token = int(_by_hand(base, [*prompt_ids, *said], said, target, readouts_TD, release.memories[index]).argmax())
        if token in base.end_ids:
            break
        said.append(token)
    return said


def _by_hand(
    base: BaseModel, ids: list[int], said: list[int], target: tuple[int, ...], readouts_TD: Tensor, delta_DF: Tensor
) -> Tensor:
    followed = 0  # target tokens said before the first that differs
    while followed < min(len(said), len(target)) and said[followed] == target[followed]:
        followed += 1

    def add(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        changed, keys = output.clone().view(len(ids), -1), inputs[0].view(len(ids), -1)
        for step in range(len(said) + 1):
            position = len(ids) - len(said) - 1 + step
            matches = step <= followed and step < len(target)
            changed[position] += readouts_TD[step] if matches else keys[position] @ delta_DF.T
        return changed.view(output.shape)

    handle = value_module(base.model, base.layer).register_forward_hook(add)
    try:
        with torch.no_grad():
            result: Tensor = base.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    finally:
        handle.remove()
    return result


def test_matched_addressing_holds_while_the_answer_follows_the_target(base: BaseModel, route_to: RouteTo) -> None:
    plain = route_to(ROUTED)
    # What the readouts make the model say is learned first, so that one answer follows its target for a token
    # and the other leaves it at the first.
    spoken = follow(base, matched(base, plain, says=[(5,) * 12, (5,) * 12]), ROUTED[0], 0)
    release = matched(base, plain, says=[(*spoken[:1], 5, 5, 5), (5,) * 12])
    answers, decisions = generate(base, release, requests(base, MIXED))
    assert answers == [generate(base, release, [request])[0][0] for request in requests(base, MIXED)]
    assert [decision.memory for decision in decisions] == [None, 0, None, 1, None]
    for index, prompt in enumerate(ROUTED):
        wanted = base.tokenizer.decode(follow(base, release, prompt, index), skip_special_tokens=True).strip()
        assert answers[MIXED.index(prompt)] == wanted
    assert answers != generate(base, plain, requests(base, MIXED))[0]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batch_size_never_changes_a_decision(base: BaseModel, route_to: RouteTo, batch: int) -> None:
    _, decisions = generate(base, route_to(ROUTED), requests(base, MIXED), batch=batch)
    assert [decision.memory for decision in decisions] == [None, 0, None, 1, None]


def _uncached(base: BaseModel, ids: list[int], *, start: int, delta: LoadedRelease, memory: int | None) -> Tensor:
    """Logits after `ids`, with ΔW added to W_v's output at every token from `start` on by hand."""

    def add(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        changed = output.clone().view(len(ids), -1)  # one sequence, whatever shape the FFN works in
        if memory is not None:
            changed[start:] += inputs[0].view(len(ids), -1)[start:] @ delta.memories[memory].T
        return changed.view(output.shape)

    handle = value_module(base.model, base.layer).register_forward_hook(add)
    try:
        with torch.no_grad():
            result: Tensor = base.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    finally:
        handle.remove()
    return result
