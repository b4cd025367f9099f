"""Continuous batching gives every request what it gets alone, whatever happens around it.

Oracle: `Generation` with that one request. The mix holds 72 requests of six kinds at once: answered by the base model,
by a release with matched and one with own addressing (four memories each), by a release of the paper's procedure, with
routing switched off, and sampled with a seed. They join and leave at any step, prompts are read in pieces, answers lose
their place in the cache, some are cancelled, and requests of several releases run side by side, as after a swap. Prefix
sharing is switched off (docs/decisions/0020).
"""

import gc
import random
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers.generation.continuous_batching.requests import RequestState

from pipeline.config import ModelSection
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.continuous import ContinuousBatching, can_batch_continuously
from pipeline.models.generate import Generation, GenerationRequest, Token
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.prompts import plain_prompt_ids
from pipeline.models.windowed import WindowedBatches
from pipeline.wise.routing import empty_router
from tests.tiny_world import WORDS
from tests.unit.models.conftest import routed_release, save_architecture

CONTEXT = 128  # tokens
PAGES = CONTEXT // 16  # the smallest cache there may be: one whole context
KINDS = ("base", "matched", "own", "paper", "off", "sampled")


@dataclass(frozen=True)
class Case:
    kind: str
    request: GenerationRequest
    release: LoadedRelease | None
    alone: tuple[Token, ...]  # the oracle's answer
    memory: int  # -1: main
    cancel_after: int | None = None  # tokens


def texts(count: int, seed: int, *, longest: int) -> list[str]:
    """Different prompts of one to `longest` words."""
    draw = random.Random(seed)
    return [f"{index} " + " ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for index in range(count)]


def follow_alone(base: BaseModel, request: GenerationRequest, release: LoadedRelease | None) -> tuple[list[Token], int]:
    """Oracle: the tokens of the request alone, and its memory (-1: main)."""
    generation = Generation(base, release, [request])
    said: list[Token] = []
    while not generation.finished:
        said += generation.step()
    memory = generation.decisions[0].memory
    return said, -1 if memory is None else memory


def with_readouts(base: BaseModel, release: LoadedRelease, prompts: Sequence[str]) -> LoadedRelease:
    """The release with readouts for targets of four tokens that answers follow for none to four of them."""
    generator = torch.Generator().manual_seed(11)
    readouts = tuple(3 * torch.randn(4, base.model.config.hidden_size, generator=generator) for _ in prompts)
    targets: list[tuple[int, ...]] = [() for _ in prompts]
    for step in range(4):  # what a readout makes the model say is known only when those before it are followed
        entries = tuple(
            replace(entry, target_ids=(*target, *[0] * (4 - step)))
            for entry, target in zip(release.entries, targets, strict=True)
        )
        known = replace(release, entries=entries, readouts=readouts)
        generation = Generation(base, known, [greedy(base, prompt, step + 1) for prompt in prompts])
        said: dict[int, list[int]] = {index: [] for index in range(len(prompts))}
        while not generation.finished:
            for token in generation.step():
                said[token.request].append(token.token_id)
        for index, tokens in said.items():
            leaves = len(tokens) <= step or step >= index % 5
            targets[index] = (*targets[index], 0 if leaves else tokens[step])
    entries = tuple(replace(entry, target_ids=ids) for entry, ids in zip(release.entries, targets, strict=True))
    return replace(release, entries=entries, readouts=readouts)


def greedy(base: BaseModel, prompt: str, tokens: int, *, routed: bool = True) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=plain_prompt_ids(prompt, base.tokenizer), text=prompt, max_new_tokens=tokens, routed=routed
    )


def mixed_cases(base: BaseModel, *, each: int, seed: int = 0) -> list[Case]:
    """`each` requests of every kind, in any order; half of the prompts of each release are routed."""
    prompts = texts(each * len(KINDS), seed, longest=24)
    half = [prompt for index, prompt in enumerate(prompts) if index % 2]
    own = routed_release(base, half, memories=4, seed=6)
    matched = with_readouts(base, routed_release(base, half, memories=4, seed=7), half)
    # ε in the middle of what the prompts have, so that about half of them are routed.
    quiet = replace(
        own, router=empty_router(int(base.model.config.hidden_size)), thresholds=(1e9,) * 4, whole_prompt=True
    )
    generation = Generation(base, quiet, [greedy(base, prompt, 1) for prompt in prompts])
    generation.step()
    strengths = sorted(decision.score for decision in generation.decisions)
    paper = replace(quiet, thresholds=(strengths[len(strengths) // 2] * 1.0001,) * 4)
    draw = random.Random(seed)
    cases = []
    for index, prompt in enumerate(prompts):
        kind = KINDS[index // 2 % len(KINDS)]  # by pairs of a routed and an unrouted prompt
        request = greedy(base, prompt, draw.choice((1, 12, 20, 28)), routed=kind != "off")
        if kind == "sampled":
            request = replace(request, temperature=0.9, top_p=0.95, top_k=40, seed=index, logprobs=3)
        release = {"base": None, "own": own, "paper": paper}.get(kind, matched)
        cancel_after = draw.randint(1, 8) if index % 9 == 4 else None
        said, memory = follow_alone(base, request, release)
        cases.append(Case(kind, request, release, tuple(said), memory, cancel_after))
    draw.shuffle(cases)
    return cases


def run(
    backend: ContinuousBatching | WindowedBatches, cases: Sequence[Case], *, sequences: int, seed: int
) -> tuple[list[list[Token]], dict[int, int], int]:
    """All cases, joining at random steps; (tokens, memory) of each, and how often answers joined running ones."""
    draw = random.Random(seed)
    waiting, running = list(range(len(cases))), set[int]()
    said: list[list[Token]] = [[] for _ in cases]
    memories: dict[int, int] = {}
    joined = 0
    while waiting or running:
        while waiting and len(running) < sequences and (not running or draw.random() < 0.6):
            key = waiting.pop(0)
            joined += any(said[other] for other in running)
            backend.add(key, cases[key].request, cases[key].release)
            running.add(key)
        for token in backend.step():
            key = token.request
            if not said[key]:
                memory = backend.decision(key).memory
                memories[key] = -1 if memory is None else memory
            said[key].append(token)
            if token.finish or len(said[key]) == cases[key].cancel_after:
                backend.remove(key)
                running.remove(key)
    return said, memories, joined


def assert_as_alone(cases: Sequence[Case], said: list[list[Token]], memories: dict[int, int]) -> None:
    for key, case in enumerate(cases):
        alone = case.alone[: case.cancel_after]
        assert [(t.token_id, t.finish) for t in said[key]] == [(t.token_id, t.finish) for t in alone], case
        assert memories[key] == case.memory, case
        for token, wanted in zip(said[key], alone, strict=True):
            assert token.logprob == (None if wanted.logprob is None else pytest.approx(wanted.logprob, abs=1e-3))
            assert [one[0] for one in token.top] == [one[0] for one in wanted.top]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = save_architecture(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=3)
    return load_base_model(ModelSection(path=str(folder), layer=1))


@pytest.fixture(scope="module")
def cases(llama: BaseModel) -> list[Case]:
    return mixed_cases(llama, each=12)


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each request lost its place in the cache after its answer had begun."""
    counted: Counter[int] = Counter()
    original = RequestState.create_equivalent_initial_request

    def counting(state: RequestState) -> RequestState:
        counted[int(state.request_id)] += bool(state.generated_tokens)
        return original(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", counting)
    return counted


def test_the_mix_is_one(llama: BaseModel, cases: Sequence[Case]) -> None:
    """Routing changes what is said, in every kind of release, and only for the routed."""
    assert len(cases) >= 64
    for kind in ("matched", "own", "paper"):
        mine = [case for case in cases if case.kind == kind]
        memories = {case.memory for case in mine}
        assert -1 in memories and len(memories) > 2, (kind, memories)
        differs = 0
        for case in mine:
            unedited = tuple(follow_alone(llama, case.request, None)[0])
            assert case.memory >= 0 or case.alone == unedited
            differs += case.alone != unedited
        assert differs > 2


def test_every_answer_is_what_it_is_alone(llama: BaseModel, cases: Sequence[Case], lost: Counter[int]) -> None:
    step_tokens = 24
    preempted = set()
    for seed in (1, 2):
        backend = ContinuousBatching(llama, sequences=16, step_tokens=step_tokens, pages=PAGES)
        said, memories, joined = run(backend, cases, sequences=16, seed=seed)
        assert_as_alone(cases, said, memories)
        assert joined > 20, "answers join while others run, and so others leave"
        preempted |= {(cases[key].kind, memories[key] >= 0) for key, times in lost.items() if times}
        lost.clear()
    # The other conditions, by name.
    assert sum(len(case.request.prompt_ids) > step_tokens for case in cases) > 10, "prompts are read in pieces"
    routed = {(kind, True) for kind in ("matched", "own", "paper")}
    assert routed <= preempted, "routed answers lost their place in the cache half-way"
    assert ("base", False) in preempted, "and others did"
    assert sum(case.cancel_after is not None for case in cases) > 5, "requests are cancelled"


def test_every_answer_is_what_it_is_alone_with_room_for_all(llama: BaseModel, cases: Sequence[Case]) -> None:
    backend = ContinuousBatching(llama, sequences=64, step_tokens=4096, pages=64 * PAGES)
    said, memories, _ = run(backend, cases, sequences=64, seed=3)
    assert_as_alone(cases, said, memories)


def test_every_architecture(base: BaseModel, lost: Counter[int]) -> None:
    """GPT-J by batches one after another, all others continuously."""
    cases = mixed_cases(base, each=3)
    continuous = can_batch_continuously(base)
    assert continuous == (base.model.config.model_type != "gptj")
    backend = (
        ContinuousBatching(base, sequences=6, step_tokens=16, pages=PAGES) if continuous else WindowedBatches(base)
    )
    said, memories, _ = run(backend, cases, sequences=6, seed=1)
    assert_as_alone(cases, said, memories)
    assert continuous == any(lost.values())


@pytest.mark.parametrize("window", [8, 40])
def test_sliding_attention(tmp_path: Path, window: int) -> None:
    """Mistral forgets what lies further back; a window may be shorter than a piece of a prompt, or longer."""
    folder = save_architecture(tmp_path, "mistral", sliding_window=window)
    base = load_base_model(ModelSection(path=str(folder), layer=1))
    cases = mixed_cases(base, each=4)
    backend = ContinuousBatching(base, sequences=8, step_tokens=16, pages=PAGES)
    said, memories, _ = run(backend, cases, sequences=8, seed=1)
    assert_as_alone(cases, said, memories)


def test_who_lost_its_place_is_not_forgotten_when_the_others_are_cancelled(
    llama: BaseModel, lost: Counter[int]
) -> None:
    """transformers lets nobody back in until an answer *finishes*; here all that run are cancelled instead."""
    backend = ContinuousBatching(llama, sequences=4, step_tokens=128, pages=PAGES)
    requests = {key: greedy(llama, prompt, 60) for key, prompt in enumerate(texts(4, 5, longest=10))}
    said: dict[int, list[int]] = {key: [] for key in requests}
    for key, request in requests.items():
        backend.add(key, request, None)
    while not lost:
        for token in backend.step():
            said[token.request].append(token.token_id)
    survivors = [key for key in requests if key not in lost]
    for key in survivors:
        backend.remove(key)
    (waiting,) = lost
    while len(said[waiting]) < 60:
        tokens = backend.step()
        assert {token.request for token in tokens} <= {waiting}
        said[waiting] += [token.token_id for token in tokens]
    assert said[waiting] == [token.token_id for token in follow_alone(llama, requests[waiting], None)[0]]


def test_after_a_step_that_raised_the_next_requests_are_answered(
    llama: BaseModel, cases: Sequence[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = ContinuousBatching(llama, sequences=12, step_tokens=24, pages=PAGES)
    for key, case in enumerate(cases[:12]):
        backend.add(key, case.request, case.release)
    for _ in range(3):
        backend.step()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(llama.model, "forward", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            backend.step()
    backend.reset()
    assert llama.model.config._attn_implementation == "sdpa"
    said, memories, _ = run(backend, cases[:24], sequences=12, seed=4)
    assert_as_alone(cases[:24], said, memories)


def test_a_release_is_let_go_with_its_last_request(llama: BaseModel) -> None:
    prompt = "who leads now"
    release = routed_release(llama, [prompt])
    memory = weakref.ref(release.memories[0])
    backend = ContinuousBatching(llama, sequences=4, step_tokens=64, pages=PAGES)
    backend.add(0, greedy(llama, prompt, 5), release)
    backend.add(1, greedy(llama, "who", 60), None)
    del release
    finished = False
    while not finished:
        gc.collect()
        assert memory() is not None
        finished = any(token.request == 0 and token.finish for token in backend.step())
    backend.remove(0)
    gc.collect()
    assert memory() is None
    assert backend.step(), "the other one still runs"
