"""Swaps and kills under load: `python -m benchmarks.hot_swap [--json] [--minutes 10] [--swaps 50] [--kills 2]`.

The demo model on two replicas, and clients of the `openai` package that never pause: chats and completions, streamed or
not, short and long, greedy and sampled. Half of them have the package's default of two retries, half have none.
Meanwhile releases are published that alternate between two contents with different answers, and replicas get a kill -9.

    failed          requests that raised, or streams that ended without saying why; of both kinds of clients
    mixed           answers that are not, to the character, what the release that they name answers alone
    visible_*       seconds from a publication to the moment when every running replica lets jobs in under it
    restart         seconds from a kill to the moment when a new replica answers
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
import torch
from ray import serve
from rich.console import Console
from rich.table import Table

from benchmarks.known_answers import (
    CONTENTS,
    DEMO,
    EDITS,
    Question,
    demo_rows,
    publish_both,
    questions,
    right_answers,
)
from jobs.serve import running_endpoint
from pipeline.actors.cluster import connect
from pipeline.config import Config, load_config
from pipeline.models.base_model import load_base_model
from pipeline.serving.deployment import APP_NAME
from pipeline.storage.object_store import open_store
from pipeline.storage.releases import list_releases, rollback

REPLICAS, CLIENTS = 2, 8
RETRIES = (openai.DEFAULT_MAX_RETRIES, 0)
REPLICA = f"ServeReplica:{APP_NAME}:{APP_NAME}"  # in its process's title
LOOK_AGAIN = 0.02  # seconds


@dataclass(frozen=True)
class Outcome:
    """`release` and `text` are what came; `problem` says why the request counts as failed."""

    question: int
    retries: int  # that the client was allowed
    seconds: float
    release: int = 0
    text: str = ""
    retried: int = 0
    problem: str | None = None


@dataclass
class Events:
    visible: list[float] = field(default_factory=list)
    restarts: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keeps the store; with that of an earlier run nothing is trained")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    # Ray gives its workers 15.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        config = load_config(overrides=settings(folder))
        connect(config.resources)
        if not list_releases(open_store(config.store)):
            publish_both(config, folder)
        asked = questions(demo_rows()[:EDITS])
        right = right_answers(config, load_base_model(config.model), asked)
        told_apart = sum(first != second for first, second in zip(*right.values(), strict=True))
        print(f"{told_apart} of {len(asked)} questions tell the two contents apart", flush=True)
        with running_endpoint(config) as url:
            events = Events()
            happenings = threading.Thread(target=happen, args=(config, options, events))
            outcomes = asyncio.run(load(url, asked, happenings))
        figures = judge(outcomes, right, contents(config)) | timings(events, options.kills)
    Console().print(table(figures))
    if options.json:
        print(json.dumps(figures))


def settings(folder: Path) -> list[str]:
    gate = [f"round.min_{score}=0" for score in ("reliability", "generalization", "locality")]
    short = ["training.max_steps=80", "merge.polish_steps=0", "training.prefixes=1"]  # what it says need not be good
    endpoint = [f"serve.replicas={REPLICAS}", "serve.port=0", "serve.live_edits=false"]
    return [f"model.path={DEMO / 'model'}", f"store.uri={folder / 'store'}", *gate, *short, *endpoint]


def happen(config: Config, options: argparse.Namespace, events: Events) -> None:
    """Publications at even distances, and kills between them."""
    store = open_store(config.store)
    started, every = time.monotonic(), 60 * options.minutes / options.swaps
    kills = {round((index + 1) * options.swaps / (options.kills + 1)) for index in range(options.kills)}
    watching = []
    for swap in range(options.swaps):
        sleep_until(started + swap * every)
        number = rollback(store, CONTENTS[swap % len(CONTENTS)]).number
        published = time.monotonic()
        wait_until(lambda number=number: all(one >= number for one in releases_in_use()))
        events.visible.append(time.monotonic() - published)
        if swap in kills:
            sleep_until(started + (swap + 0.5) * every)
            watching.append(threading.Thread(target=kill_one, args=(events,)))
            watching[-1].start()
    for one in watching:
        one.join()
    sleep_until(started + 60 * options.minutes)


def kill_one(events: Events) -> None:
    before = replicas()
    os.kill(min(before), signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: len(replicas() - {min(before)}) == REPLICAS and len(releases_in_use()) == REPLICAS)
    events.restarts.append(time.monotonic() - killed)


def replicas() -> set[int]:
    """Process ids, of our own Ray."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if REPLICA in title and "__init__" not in title:
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


def releases_in_use() -> list[int]:
    """Of every running replica; while one dies the question is asked again."""
    while True:
        try:
            return list(serve.get_deployment_handle(APP_NAME, APP_NAME).broadcast("release").results(timeout_s=30))
        except Exception:
            time.sleep(LOOK_AGAIN)


def wait_until(reached: Any) -> None:
    while not reached():
        time.sleep(LOOK_AGAIN)


def sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


async def load(
    url: str, asked: Sequence[Question], happenings: threading.Thread, *, clients: int = CLIENTS
) -> list[Outcome]:
    """Every client asks one question after another for as long as something may happen."""
    outcomes: list[Outcome] = []

    async def client(number: int) -> None:
        draw, retries = random.Random(number), RETRIES[number % len(RETRIES)]
        async with openai.AsyncOpenAI(api_key="none", base_url=f"{url}/v1", max_retries=retries) as api:
            while happenings.is_alive():
                question = draw.randrange(len(asked))
                outcomes.append(await ask(api, asked, question, stream=draw.random() < 0.5))

    happenings.start()
    await asyncio.gather(*(client(number) for number in range(clients)))
    return outcomes


async def ask(api: openai.AsyncOpenAI, asked: Sequence[Question], question: int, *, stream: bool) -> Outcome:
    chat, body = asked[question].chat, asked[question].body
    create: Any = (api.chat.completions if chat else api.completions).with_raw_response.create
    sent = time.perf_counter()

    def outcome(**fields: Any) -> Outcome:
        return Outcome(question, api.max_retries, time.perf_counter() - sent, **fields)

    try:
        raw = await create(**body, stream=stream)
        release, parsed = int(raw.headers["x-wiseline-release"]), raw.parse()
        bodies = [one async for one in parsed] if stream else [parsed]
    except Exception as error:
        return outcome(problem=f"{type(error).__name__}: {error}")
    choices = [one.choices[0] for one in bodies]
    parts = [(one.delta if stream else one.message).content if chat else one.text for one in choices]
    named = {body.wiseline["release"] for body in bodies if hasattr(body, "wiseline")}
    text = "".join(part or "" for part in parts)
    if named != {release}:
        return outcome(release=-1, text=f"releases {named} behind a header that says {release}: {text}")
    ended = choices[-1].finish_reason is not None
    return outcome(
        release=release, text=text, retried=raw.retries_taken, problem=None if ended else "a stream without an end"
    )


def contents(config: Config) -> dict[int, int]:
    """Of each release: which of the two it says again."""
    return {release.number: release.restores or release.number for release in list_releases(open_store(config.store))}


def judge(outcomes: Sequence[Outcome], right: dict[int, list[str]], content_of: dict[int, int]) -> dict[str, Any]:
    failed = [one for one in outcomes if one.problem]
    mixed = [
        one
        for one in outcomes
        if not one.problem and (one.release < 0 or one.text.strip() != right[content_of[one.release]][one.question])
    ]
    for one in failed[:20]:
        print(f"failed after {one.seconds:.1f} s with {one.retries} retries: {one.problem}")
    for one in mixed[:20]:
        print(f"mixed: question {one.question}, release {one.release}: {one.text!r}")
    seconds = sorted(one.seconds for one in outcomes)
    of_clients = Counter(one.retries for one in failed)
    return {
        "requests": len(outcomes),
        "failed": len(failed),
        "failed_with_retries": of_clients[RETRIES[0]],
        "failed_without_retries": of_clients[0],
        "retried_by_clients": sum(one.retried > 0 for one in outcomes),
        "mixed": len(mixed),
        "request_p50_seconds": statistics.median(seconds),
        "request_p99_seconds": percentile(seconds, 0.99),
        "request_max_seconds": seconds[-1],
    }


def timings(events: Events, kills: int) -> dict[str, Any]:
    visible = sorted(events.visible)
    return {
        "swaps": len(visible),
        "visible_p50_seconds": statistics.median(visible),
        "visible_p99_seconds": percentile(visible, 0.99),
        "visible_max_seconds": visible[-1],
        "kills": len(events.restarts),
        "restart_seconds": events.restarts,
    }


def percentile(rising: Sequence[float], share: float) -> float:
    return rising[min(len(rising) - 1, int(share * len(rising)))]


def table(figures: dict[str, Any], *, title: str = "Swaps and kills under load") -> Table:
    rows = Table("", "", title=title)
    for name, figure in figures.items():
        values = figure if isinstance(figure, list) else [figure]
        rows.add_row(
            name.replace("_", " "),
            ", ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values),
        )
    return rows


if __name__ == "__main__":
    main()
