"""The endpoint under load, against serial requests and against its own engine: `python -m benchmarks.serve [--json]`.

A random Llama of 16 layers and 30 M parameters in the demo's tokenizer. The demo model itself is too small for this: a
step of it is Python, whatever the batch. Here a step is matrix products, as a server's is, and one side memory is 1.3 %
of the weights (0.6 % in Llama-2-7B). 32 requests with prompts of 8 to 80 tokens and answers of 8 to 36; the endpoint is
the real one, Ray Serve and all. Every comparison is made in turns within this run.

    over_serial         endpoint: tokens/s at 16 concurrent requests, over the same requests one after another
    over_engine         endpoint: tokens/s at 16 concurrent, over the engine driven without HTTP in this process
    routed_over_base    engine at 16 concurrent: tokens/s with 8 memories and every other request routed, over none.
                        Addressing `own`: a routed row reads its memory at every token, which is the most it can cost
    first_token_ms      endpoint, streamed: p50 and p99 from sending to the first event, at 1, 16 and 64 concurrent
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from jobs.serve import running_endpoint
from pipeline.config import Config, load_config
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.generate import Generation, GenerationRequest
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.prompts import plain_prompt_ids
from pipeline.models.value_matrix import value_module
from pipeline.serving.engine import Engine
from pipeline.storage.bank import BankEntry
from pipeline.training.activations import read_prompts
from pipeline.wise.routing import Router, whitened

DEMO = Path(__file__).parents[1] / "demo"
WIDTH, FFN, LAYERS, LAYER = 384, 1024, 16, 13
REQUESTS, CONCURRENT, MEMORIES = 32, 16, 8
LEVELS = {1: 8, 16: 32, 64: 64}  # concurrent: requests in all
ROUNDS = 2

T = TypeVar("T")
Ask = Callable[[GenerationRequest], Awaitable[int]]  # one request; how many tokens it got


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--engine-only", action="store_true", help="leave out the endpoint")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    # Ray gives its workers 15, which would favour the engine in this process on a busy machine.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder) / "model")
        settings = [f"model.path={folder}/model", f"model.layer={LAYER}", f"store.uri={folder}/store", "serve.port=0"]
        settings.append("serve.live_edits=false")  # a trainer beside it would only idle
        config = load_config(overrides=settings)
        base = load_base_model(config.model)
        requests = mixed_requests(base)
        figures = asyncio.run(measure_engine(base, config, requests))
        if not options.engine_only:
            with running_endpoint(config) as url:
                figures |= asyncio.run(measure_endpoint(base, config, url, requests))
    Console().print(table(figures))
    if options.json:
        print(json.dumps(figures))


async def measure_engine(base: BaseModel, config: Config, requests: Sequence[GenerationRequest]) -> dict[str, Any]:
    release = routing_half_of(base, requests)
    async with running_engine(base, config) as engine:
        ask = asks_engine(engine)

        async def rate(with_release: bool) -> float:
            engine.release = release if with_release else None
            return await tokens_per_second(ask, requests, concurrent=CONCURRENT)

        plain, routed = await in_turns([lambda: rate(False), lambda: rate(True)])
    return {"engine_tokens_per_second": plain, "routed_tokens_per_second": routed, "routed_over_base": routed / plain}


async def measure_endpoint(
    base: BaseModel, config: Config, url: str, requests: Sequence[GenerationRequest]
) -> dict[str, Any]:
    connections = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with (
        running_engine(base, config) as engine,
        aiohttp.ClientSession(connector=connections, timeout=timeout) as http,
    ):
        asks = asks_endpoint(http, url)
        serial, concurrent, driven = await in_turns(
            [
                lambda: tokens_per_second(asks, requests, concurrent=1),
                lambda: tokens_per_second(asks, requests, concurrent=CONCURRENT),
                lambda: tokens_per_second(asks_engine(engine), requests, concurrent=CONCURRENT),
            ]
        )
        first = {str(level): await first_tokens(http, url, requests, level, LEVELS[level]) for level in LEVELS}
    return {
        "serial_tokens_per_second": serial,
        "endpoint_tokens_per_second": concurrent,
        "engine_beside_endpoint_tokens_per_second": driven,
        "over_serial": concurrent / serial,
        "over_engine": concurrent / driven,
        "first_token_ms": first,
    }


async def in_turns(measures: Sequence[Callable[[], Awaitable[float]]]) -> list[float]:
    """Median of each, taken in turns so that a busy machine slows all of them alike; the first turn warms up."""
    taken = [[await measure() for measure in measures] for _ in range(1 + ROUNDS)]
    return [statistics.median(column) for column in zip(*taken[1:], strict=True)]


async def tokens_per_second(ask: Ask, requests: Sequence[GenerationRequest], *, concurrent: int) -> float:
    """With always `concurrent` requests under way."""
    started = time.perf_counter()
    tokens = await at_once(ask, requests, concurrent=concurrent)
    return sum(tokens) / (time.perf_counter() - started)


async def at_once(
    ask: Callable[[GenerationRequest], Awaitable[T]], requests: Sequence[GenerationRequest], *, concurrent: int
) -> list[T]:
    waiting = iter(requests)

    async def client() -> list[T]:
        return [await ask(request) for request in waiting]

    return [one for answers in await asyncio.gather(*(client() for _ in range(concurrent))) for one in answers]


def asks_engine(engine: Engine) -> Ask:
    async def ask(request: GenerationRequest) -> int:
        job = engine.submit([request], whole=True)
        await job.started()
        return [piece async for piece in job.pieces()][-1].tokens

    return ask


def asks_endpoint(http: aiohttp.ClientSession, url: str) -> Ask:
    async def ask(request: GenerationRequest) -> int:
        async with http.post(f"{url}/v1/completions", json=body_of(request)) as response:
            response.raise_for_status()
            return int((await response.json())["usage"]["completion_tokens"])

    return ask


def body_of(request: GenerationRequest) -> dict[str, Any]:
    return {"model": "wiseline", "prompt": request.text, "max_tokens": request.max_new_tokens}


async def first_tokens(
    http: aiohttp.ClientSession, url: str, requests: Sequence[GenerationRequest], concurrent: int, total: int
) -> dict[str, float]:
    """Milliseconds, with always `concurrent` streams under way."""

    async def ask(request: GenerationRequest) -> float:
        sent = time.perf_counter()
        async with http.post(f"{url}/v1/completions", json={**body_of(request), "stream": True}) as response:
            response.raise_for_status()
            await response.content.readline()
            first = time.perf_counter() - sent
            await response.read()
            return 1000 * first

    repeated = [requests[index % len(requests)] for index in range(total)]
    taken = sorted(await at_once(ask, repeated, concurrent=concurrent))
    return {"p50": statistics.median(taken), "p99": taken[min(len(taken) - 1, int(0.99 * len(taken)))]}


@asynccontextmanager
async def running_engine(base: BaseModel, config: Config) -> AsyncIterator[Engine]:
    engine = Engine(base, config.serve)
    engine.start()
    yield engine
    await asyncio.to_thread(engine.close)


def save_random_model(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def mixed_requests(base: BaseModel) -> list[GenerationRequest]:
    questions = [json.loads(line)["prompt"] for line in (DEMO / "edits.jsonl").read_text("utf-8").splitlines()]
    requests = []
    for index in range(REQUESTS):
        prompt = " ".join(questions[index * 6 : index * 6 + 1 + index % 6])
        answer = 8 + 4 * (index * 5 % 8)
        ids = plain_prompt_ids(prompt, base.tokenizer)
        requests.append(GenerationRequest(prompt_ids=ids, text=prompt, max_new_tokens=answer))
    return requests


def routing_half_of(base: BaseModel, requests: Sequence[GenerationRequest]) -> LoadedRelease:
    """Every other request has an entry of its own; the entries lie in the memories in turn."""
    mine = requests[::2]
    generator = torch.Generator().manual_seed(0)
    shape = value_module(base.model, base.layer).weight.shape
    memories = tuple(0.02 * torch.randn(shape, generator=generator) for _ in range(MEMORIES))
    states = read_prompts(base, [request.prompt_ids for request in mine]).states_ND
    mean_D, whiten_DD = states.mean(dim=0), torch.eye(WIDTH)
    entries = len(mine)
    router = Router(
        mean_D=mean_D,
        whiten_DD=whiten_DD,
        keys_ND=whitened(states, mean_D, whiten_DD),
        entry_N=torch.arange(entries),
        memory_E=torch.arange(entries) % MEMORIES,
        asked_EM=torch.zeros(entries, 0),
        relation_EM=torch.zeros(entries, 0),
        weights_S=torch.tensor([1.0, 0.0, 0.0, 0.0]),
        bias_E=torch.zeros(entries),
        threshold=0.999,
    )
    bank = tuple(
        BankEntry(edit_id=str(index), prompt=request.text, target="", subject=None, memory=index % MEMORIES)
        for index, request in enumerate(mine)
    )
    release = LoadedRelease(number=1, memories=memories, router=router, entries=bank)
    batch = Generation(base, release, requests)
    batch.step()
    memories_of = [decision.memory for decision in batch.decisions]
    assert all((memory is None) == bool(index % 2) for index, memory in enumerate(memories_of)), "not half is routed"
    return release


def table(figures: dict[str, Any]) -> Table:
    rows = Table("", "", title="The endpoint under load")
    for name, figure in figures.items():
        if name == "first_token_ms":
            for level, of_level in figure.items():
                text = f"p50 {of_level['p50']:.0f}, p99 {of_level['p99']:.0f}"
                rows.add_row(f"ms to the first token, {level} concurrent", text)
        else:
            rows.add_row(name.replace("_", " "), f"{figure:.3g}")
    return rows


if __name__ == "__main__":
    main()
