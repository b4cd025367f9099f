"""Which memories lie on the device changes no answer; least recently read ones leave; releases share what they have."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import ModelSection
from pipeline.errors import CorruptObject
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.prompts import plain_prompt_ids
from pipeline.models.side_memories import MemoryCache, SideMemories
from pipeline.storage.deltas import MemoryMetadata, SideMemory, encode_memory
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import ObjectRef
from pipeline.wise.routing import empty_router
from tests.unit.models.conftest import save_architecture

RouteTo = Callable[[Sequence[str]], LoadedRelease]

PROMPTS = ["The capital of France is", "Who leads the company?", "東京", "Wie heißt die Hauptstadt?"]
D, F = 32, 64
GIB = D * F * 4 / 2**30  # of one memory
BUDGETS = [1e-12, 1.5 * GIB, 2 * GIB, "auto"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Llama alone: what is tested here does not look into the architecture."""
    folder = save_architecture(tmp_path_factory.mktemp("llama"), "llama")
    return load_base_model(ModelSection(path=str(folder), layer=1))


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path / "store"))


@pytest.fixture
def references(store: ObjectStore, base: BaseModel) -> list[ObjectRef]:
    """Four memories of large random ΔW."""
    random = np.random.default_rng(3)
    stored = []
    for index in range(len(PROMPTS)):
        metadata = MemoryMetadata(
            model_fingerprint=base.fingerprint,
            layer=base.layer,
            method="keyed",
            shards=1,
            edits_digest="",
            config_digest="",
            rows=D,
            columns=F,
        )
        data = encode_memory(SideMemory(metadata, random.standard_normal((D, F), dtype=np.float32)))
        stored.append(ObjectRef(path=f"memories/{index}", sha256=store.put(f"memories/{index}", data)))
    return stored


def on_device(memories: SideMemories) -> list[int]:
    return [index for index, held in enumerate(memories._held) if held.device_DF is not None]


def requests(base: BaseModel, prompts: Sequence[str]) -> list[GenerationRequest]:
    return [
        GenerationRequest(prompt_ids=plain_prompt_ids(prompt, base.tokenizer), text=prompt, max_new_tokens=8)
        for prompt in prompts
    ]


def with_own(release: LoadedRelease, memories: Sequence[torch.Tensor]) -> LoadedRelease:
    """Prompt m is answered by memory m, read at the prompt's own keys."""
    return replace(release, memories=memories, router=replace(release.router, memory_E=torch.arange(len(memories))))


@pytest.mark.parametrize("device_gib", BUDGETS)
@pytest.mark.parametrize("by_activation", [False, True])
def test_answers_do_not_depend_on_what_lies_on_the_device(
    base: BaseModel,
    route_to: RouteTo,
    store: ObjectStore,
    references: list[ObjectRef],
    device_gib: float,
    by_activation: bool,
) -> None:
    """Oracle: a release that simply holds all its matrices."""
    memories = MemoryCache(base, device_gib=device_gib).hold(store, references)
    held = with_own(route_to(PROMPTS), tuple(held.host_DF.to(base.layer_device) for held in memories._held))
    if by_activation:
        router = empty_router(D)
        held = replace(held, router=router, thresholds=(0.0,) * len(PROMPTS), whole_prompt=True)
    cached = replace(held, memories=memories)
    wanted, decisions = generate(base, held, requests(base, PROMPTS))
    assert all(decision.memory is not None for decision in decisions)
    assert wanted != generate(base, None, requests(base, PROMPTS))[0]
    for batch in (1, 3, 4):
        assert generate(base, cached, requests(base, PROMPTS), batch=batch)[0] == wanted
    backwards = generate(base, cached, requests(base, PROMPTS[::-1]), batch=2)[0]
    assert backwards[::-1] == wanted


def test_the_least_recently_read_leave(base: BaseModel, store: ObjectStore, references: list[ObjectRef]) -> None:
    memories = MemoryCache(base, device_gib=2 * GIB).hold(store, references)
    assert on_device(memories) == []
    seen = []
    for index in (0, 1, 2, 1, 0, 0, 3):
        _ = memories[index]
        seen.append(on_device(memories))
    assert seen == [[0], [0, 1], [1, 2], [1, 2], [0, 1], [0, 1], [0, 3]]


def test_one_memory_has_room_however_little_there_is(
    base: BaseModel, store: ObjectStore, references: list[ObjectRef]
) -> None:
    memories = MemoryCache(base, device_gib=1e-12).hold(store, references)
    for index in range(4):
        _ = memories[index]
        assert on_device(memories) == [index]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_leaves_the_gpu_takes_no_room_there(
    base: BaseModel, store: ObjectStore, references: list[ObjectRef]
) -> None:
    memories = MemoryCache(base, device_gib=1e-12).hold(store, references)
    assert memories[0].is_cuda and torch.equal(memories[0].cpu(), memories._held[0].host_DF)
    before = torch.cuda.memory_allocated(base.layer_device)
    for index in (1, 2, 3, 0):
        assert torch.equal(memories[index].cpu(), memories._held[index].host_DF)
    assert torch.cuda.memory_allocated(base.layer_device) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_copied_and_nothing_leaves(
    base: BaseModel, store: ObjectStore, references: list[ObjectRef]
) -> None:
    memories = MemoryCache(base).hold(store, references)
    for matrix, held in zip(memories, memories._held, strict=True):
        assert matrix is held.host_DF
    assert on_device(memories) == [0, 1, 2, 3]


def test_an_answer_that_follows_its_target_reads_no_matrix(
    base: BaseModel, route_to: RouteTo, store: ObjectStore, references: list[ObjectRef]
) -> None:
    """Readouts of nothing make the edited model say what the base model says; so that is the target."""
    memories = MemoryCache(base).hold(store, references)
    release = with_own(route_to(PROMPTS), memories)
    wanted, _ = generate(base, None, requests(base, PROMPTS))
    said = [tuple(_greedy_ids(base, request)) for request in requests(base, PROMPTS)]
    entries = tuple(replace(entry, target_ids=ids) for entry, ids in zip(release.entries, said, strict=True))
    silent = replace(release, entries=entries, readouts=tuple(torch.zeros(len(ids), D) for ids in said))
    answers, decisions = generate(base, silent, requests(base, PROMPTS))
    assert (answers, [decision.memory for decision in decisions]) == (wanted, [0, 1, 2, 3])
    assert on_device(memories) == []
    left = replace(entries[2], target_ids=(5, *said[2][1:]))
    generate(base, replace(silent, entries=(*entries[:2], left, entries[3])), requests(base, PROMPTS))
    assert on_device(memories) == [2]


def test_releases_share_the_memories_they_have_in_common(
    base: BaseModel, store: ObjectStore, references: list[ObjectRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    get = store.read
    monkeypatch.setattr(store, "read", lambda path, **checks: (read.append(path), get(path, **checks))[1])
    cache = MemoryCache(base)
    old = cache.hold(store, references[:3])
    new = cache.hold(store, references[1:])
    assert read == [reference.path for reference in references]
    assert old[1] is new[0]
    del old
    gc.collect()
    cache.hold(store, references)
    assert read[4:] == [references[0].path], "what no release names any more was let go"


def test_a_damaged_memory_is_refused_when_it_is_loaded(
    base: BaseModel, store: ObjectStore, references: list[ObjectRef]
) -> None:
    wrong = references[0].model_copy(update={"sha256": "0" * 64})
    with pytest.raises(CorruptObject):
        MemoryCache(base).hold(store, [*references, wrong])


def _greedy_ids(base: BaseModel, request: GenerationRequest) -> list[int]:
    ids = torch.tensor([request.prompt_ids], device=base.device)
    for _ in range(request.max_new_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, base.model(ids, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
        if int(ids[0, -1]) in base.end_ids:
            break
    return ids[0, len(request.prompt_ids) :].tolist()
