"""The engine with the real model behind a gate: batching, limits, cancellation, failures and swaps."""

import asyncio
import gc
import weakref
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from pipeline.config import ServeSection
from pipeline.errors import ConfigError
from pipeline.logs import about
from pipeline.models.base_model import BaseModel
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import LoadedRelease
from pipeline.serving import engine as engine_module
from pipeline.serving.engine import Engine, EngineStopped, GenerationFailed, Job, QueueFull
from pipeline.serving.openai_responses import Choice
from tests.tiny_world import publish_release
from tests.unit.serving.conftest import Endpoint, Gate

PROMPTS = ["The capital of France is", "Who leads", "日本の首都は"]


def request(base: BaseModel, prompt: str, *, tokens: int = 8) -> GenerationRequest:
    return GenerationRequest(prompt_ids=tuple(base.tokenizer(prompt)["input_ids"]), text=prompt, max_new_tokens=tokens)


@pytest.fixture
async def started(base: BaseModel) -> AsyncIterator[Callable[..., Engine]]:
    engines = []

    def start(**section: object) -> Engine:
        engine = Engine(base, ServeSection.model_validate(section))
        engine.start()
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        await asyncio.to_thread(engine.close)


async def texts(job: Job) -> dict[int, str]:
    await job.started()
    return await rest(job)


async def rest(job: Job) -> dict[int, str]:
    said = dict.fromkeys(range(len(job.requests)), "")
    async for piece in job.pieces():
        said[piece.index] += piece.text
    return said


async def reach(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.reached.wait, 30)


async def test_jobs_that_wait_together_share_a_batch_and_get_what_they_get_alone(
    base: BaseModel, started: Callable[..., Engine], gate: Gate
) -> None:
    gate.open()
    alone = [generate(base, None, [request(base, prompt)])[0][0] for prompt in PROMPTS]
    gate.opened.clear()
    gate.reached.clear()
    engine = started()
    gate.forwards = 0
    jobs = [engine.submit([request(base, prompt)]) for prompt in PROMPTS]
    gate.open()
    together = [(await texts(job))[0].strip() for job in jobs]
    assert together == alone
    assert gate.forwards < 8 + len(PROMPTS)  # not one after another


async def test_a_batch_takes_no_more_than_it_may(base: BaseModel, started: Callable[..., Engine], gate: Gate) -> None:
    engine = started(max_batch_requests=2)
    jobs = [engine.submit([request(base, "Who")])]
    await reach(gate)
    jobs += [engine.submit([request(base, prompt)]) for prompt in PROMPTS]
    gate.open()
    for job in jobs:
        await texts(job)
    assert gate.forwards == 1 + 2 * 8  # the first is alone at its first step; then there are always two


async def test_a_full_queue_refuses_and_a_cancelled_job_makes_room(
    base: BaseModel, started: Callable[..., Engine], gate: Gate
) -> None:
    engine = started(max_queued_requests=2, max_batch_requests=1)
    running = engine.submit([request(base, "Who")])
    await reach(gate)
    waiting = [engine.submit([request(base, prompt)]) for prompt in PROMPTS[:2]]
    with pytest.raises(QueueFull):
        engine.submit([request(base, "one too many")])
    waiting[0].cancel()
    late = engine.submit([request(base, "now there is room")])
    gate.open()
    for job in (running, waiting[1], late):
        await texts(job)


async def test_a_cancelled_answer_stops_the_model(base: BaseModel, started: Callable[..., Engine], gate: Gate) -> None:
    engine = started()
    job = engine.submit([request(base, "Who leads", tokens=200)])
    await reach(gate)
    job.cancel()
    gate.open()
    await texts(engine.submit([request(base, "Who", tokens=1)]))
    assert gate.forwards < 10


async def test_a_stop_string_stops_the_model(base: BaseModel, started: Callable[..., Engine], gate: Gate) -> None:
    gate.open()
    engine = started()
    whole = (await texts(engine.submit([request(base, PROMPTS[0], tokens=30)])))[0]
    stop = whole[3:5]
    gate.forwards = 0
    job = engine.submit([request(base, PROMPTS[0], tokens=30)], stop=[stop])
    await job.started()
    pieces = [piece async for piece in job.pieces()]
    assert "".join(piece.text for piece in pieces) == whole[: whole.find(stop)]
    assert pieces[-1].finish == "stop"
    assert gate.forwards < 30


async def test_one_failed_batch_fails_its_requests_and_the_engine_lives_on(
    base: BaseModel, started: Callable[..., Engine], gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    engine = started()
    gate.failures.append(RuntimeError("CUDA out of memory"))
    with about(request_id="mine"):
        job = engine.submit([request(base, "Who")])
    gate.open()
    with pytest.raises(GenerationFailed, match="RuntimeError"):
        await job.started()
    assert await texts(engine.submit([request(base, "Who")]))
    assert engine.alive
    [failure] = caplog.records
    assert failure.__dict__["request_ids"] == ["mine"]


async def test_answers_are_counted(
    base: BaseModel, started: Callable[..., Engine], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: defaultdict[str, list[float]] = defaultdict(list)

    def record(name: str, value: float = 1.0, **labels: str) -> None:
        seen[" ".join([name.removeprefix("wiseline_"), *labels.values()])].append(value)

    monkeypatch.setattr(engine_module, "record", record)
    gate.open()
    engine = started(max_queued_requests=2)
    unrouted = replace(request(base, PROMPTS[1], tokens=3), routed=False)
    jobs = [engine.submit([request(base, PROMPTS[0], tokens=5)]), engine.submit([unrouted])]
    said = [piece for job in jobs async for piece in ended(job)]
    with pytest.raises(QueueFull):
        engine.submit([unrouted] * 3)
    assert sum(seen["tokens_total"]) == sum(max(piece.tokens for piece in job) for job in said)
    assert sorted(seen["prompt_tokens_total"]) == sorted(len(job.requests[0].prompt_ids) for job in jobs)
    assert (seen["answers_total main"], seen["answers_total off"]) == ([1], [1])
    assert len(seen["first_token_seconds"]) == 2 and min(seen["first_token_seconds"]) > 0
    assert seen["refused_requests_total"] == [1]
    assert not seen["routing_margin"]  # without a release there is nothing near


async def ended(job: Job) -> AsyncIterator[list[Choice]]:
    await job.started()
    yield [piece async for piece in job.pieces()]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_when_the_thread_dies_everybody_is_told(
    base: BaseModel, started: Callable[..., Engine], gate: Gate
) -> None:
    engine = started(max_batch_requests=1)
    gate.failures.append(SystemExit())
    running = engine.submit([request(base, "Who")])
    await reach(gate)
    waiting = engine.submit([request(base, "Who")])
    gate.open()
    with pytest.raises(GenerationFailed):
        await running.started()
    with pytest.raises(EngineStopped):
        await waiting.started()
    assert not engine.alive
    with pytest.raises(EngineStopped):
        engine.submit([request(base, "Who")])


async def test_closing_finishes_the_running_batch_and_fails_what_waits(
    base: BaseModel, started: Callable[..., Engine], gate: Gate
) -> None:
    engine = started(max_batch_requests=1)
    running = engine.submit([request(base, "Who")])
    await reach(gate)
    waiting = engine.submit([request(base, "Who")])
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    while engine.alive:
        await asyncio.sleep(0.001)
    gate.open()
    await closing
    assert await texts(running)
    with pytest.raises(EngineStopped):
        await waiting.started()


def two_releases(endpoint: Endpoint) -> list[LoadedRelease]:
    """They answer the first prompt differently."""
    loaded = []
    for seed in (1, 2):
        publish_release(endpoint.store, endpoint.base, prompts=PROMPTS[:1], seed=seed)
        endpoint.follower.follow()
        assert endpoint.engine.release is not None
        loaded.append(endpoint.engine.release)
    return loaded


async def test_a_swap_does_not_touch_an_answer_that_has_begun(base: BaseModel, endpoint: Endpoint, gate: Gate) -> None:
    gate.open()
    loaded = two_releases(endpoint)
    wanted = request(base, PROMPTS[0], tokens=12)
    first, second = (generate(base, release, [wanted])[0][0] for release in loaded)
    assert first != second

    gate.opened.clear()
    gate.reached.clear()
    endpoint.engine.swap(loaded[0])
    begun = endpoint.engine.submit([wanted])
    await reach(gate)
    endpoint.engine.swap(loaded[1])
    gate.open()
    assert (await begun.started()).release is loaded[0]
    assert "".join([piece.text async for piece in begun.pieces()]).strip() == first
    assert (await texts(endpoint.engine.submit([replace(wanted)])))[0].strip() == second


async def test_swaps_between_jobs_that_run_side_by_side(base: BaseModel, endpoint: Endpoint, gate: Gate) -> None:
    """Twenty jobs, a swap after each: every one is answered by the release that was there when it began."""
    gate.open()
    loaded = two_releases(endpoint)
    wanted = request(base, PROMPTS[0], tokens=40)
    alone = {id(release): generate(base, release, [wanted])[0][0] for release in loaded}

    async def ask(turn: int) -> None:
        endpoint.engine.swap(loaded[turn % 2])
        job = endpoint.engine.submit([wanted, wanted])
        release = (await job.started()).release
        assert release in loaded
        said = await rest(job)
        assert [said[index].strip() for index in range(2)] == [alone[id(release)]] * 2

    asking = []
    for turn in range(20):
        asking.append(asyncio.create_task(ask(turn)))
        await asyncio.sleep(0.01)
    await asyncio.gather(*asking)


async def test_a_release_is_freed_when_its_last_job_ends(base: BaseModel, endpoint: Endpoint, gate: Gate) -> None:
    gate.open()
    publish_release(endpoint.store, base, prompts=PROMPTS[:1], seed=1)
    endpoint.follower.follow()
    publish_release(endpoint.store, base, prompts=PROMPTS[:1], seed=2)
    gate.opened.clear()
    gate.reached.clear()
    job = endpoint.engine.submit([request(base, PROMPTS[0], tokens=12)])
    await reach(gate)
    assert endpoint.engine.release is not None
    [memory] = endpoint.engine.release.memories._held  # type: ignore[attr-defined]
    kept = weakref.finalize(memory, lambda: None)
    del memory
    endpoint.follower.follow()
    gc.collect()
    assert kept.alive  # its answer has begun
    gate.open()
    await texts(job)
    del job
    while kept.alive:
        gc.collect()
        await asyncio.sleep(0.01)


async def test_a_job_may_have_more_prompts_than_there_is_room_for(
    base: BaseModel, started: Callable[..., Engine], gate: Gate
) -> None:
    gate.open()
    engine = started(max_batch_requests=2)
    wanted = [request(base, prompt, tokens=4 + index) for index, prompt in enumerate(PROMPTS * 2)]
    job = engine.submit(wanted)
    assert len((await job.started()).decisions) == len(wanted)
    said = await rest(job)
    assert [said[index].strip() for index in range(len(wanted))] == generate(base, None, wanted)[0]


async def test_closing_finishes_a_job_that_has_begun_with_some_of_its_prompts(
    base: BaseModel, started: Callable[..., Engine], gate: Gate
) -> None:
    engine = started(max_batch_requests=1)
    running = engine.submit([request(base, prompt) for prompt in PROMPTS])
    await reach(gate)
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    while engine.alive:
        await asyncio.sleep(0.001)
    gate.open()
    await closing
    assert len(await texts(running)) == len(PROMPTS)


async def test_a_cancelled_answer_frees_its_place(base: BaseModel, started: Callable[..., Engine], gate: Gate) -> None:
    engine = started(max_batch_requests=1)
    long = engine.submit([request(base, "Who leads", tokens=200)])
    await reach(gate)
    late = engine.submit([request(base, "Who", tokens=2)])
    long.cancel()
    gate.open()
    await texts(late)
    assert gate.forwards < 6


async def test_a_model_that_cannot_batch_continuously_is_served_batch_by_batch(
    base: BaseModel, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.open()
    monkeypatch.setattr(type(base.model), "_supports_attention_backend", False)
    engine = Engine(base, ServeSection(max_batch_requests=2))
    engine.start()
    jobs = [engine.submit([request(base, prompt)]) for prompt in PROMPTS]
    said = [(await texts(job))[0].strip() for job in jobs]
    await asyncio.to_thread(engine.close)
    assert said == [generate(base, None, [request(base, prompt)])[0][0] for prompt in PROMPTS]


def test_a_cache_without_room_for_one_context_is_refused(base: BaseModel) -> None:
    with pytest.raises(ConfigError, match=r"serve\.cache_gib"):
        Engine(base, ServeSection(cache_gib=1e-5))
