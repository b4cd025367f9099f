"""Posted edits: how long from POST to the right answer on every replica: `python -m benchmarks.live_edits [--json]`.

The demo model behind an endpoint of two replicas; facts that it knows are posted with other answers, one by one at a
steady rate. Whenever a replica names another release, all are asked over HTTP what one of them did not answer rightly
yet, the longest posted first, as far as anything of a request was ever answered rightly; so the asking costs little of
the processor that the trainer needs. When all are posted, everything is asked. Then fewer edits are posted, and the
trainer is killed (SIGKILL) in the middle.

    p95_seconds           from POST to the last replica's first right answer; also p50 and max
    after_kill_seconds    from the kill, or the POST where that came later, to the same; the slowest edit
    lost                  edits that some replica still does not answer minutes after the last post

The router reads states and subjects, as after `make demo`; with `--encoder` texts too.
"""

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests

from demo.facts import all_facts
from jobs.serve import running_endpoint
from pipeline.config import load_config
from pipeline.serving.carry_on import RELEASE_HEADER
from pipeline.serving.release_headers import REPLICA_HEADER

ROOT = Path(__file__).parents[1]
PROMPTS_PER_QUESTION = 64  # in one request
POSTS_AT_ONCE = 32
TRIES = 3  # requests for each replica, until every one is reached
LOOK_SECONDS = 0.25  # between two looks at which release is served
PATIENCE = 300.0  # seconds after the last post; what is not answered then is lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=10.0, help="edits per second")
    parser.add_argument("--seconds", type=float, default=60.0, help="of posting")
    parser.add_argument("--after-kill", type=int, default=60, help="edits posted around the kill")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--encoder", action="store_true", help="route with the sentence encoder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    edits = invented_edits(int(options.rate * options.seconds) + options.after_kill)
    posted, killed = edits[: -options.after_kill], edits[-options.after_kill :]
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"model.path={ROOT / 'demo' / 'model'}", f"store.uri={folder}", "serve.port=0"]
        settings += [f"serve.replicas={options.replicas}", "serve.live_edits=true"]
        settings += [] if options.encoder else ["router.signals=[keys, subject]"]
        with running_endpoint(load_config(overrides=settings)) as url:
            endpoint = Endpoint(url, options.replicas)
            endpoint.measure(edits[:1], rate=options.rate)  # what starts once is not part of it
            steady = endpoint.measure(posted, rate=options.rate)
            after = endpoint.measure(killed, rate=options.rate, at_half=kill_the_trainer)
    result = summary(steady, after, options)
    for name, value in result.items():
        print(f"{name:20} {value}")
    if options.json:
        print(json.dumps(result))


def invented_edits(count: int) -> list[dict[str, Any]]:
    """Facts that the demo model knows, shuffled, each with the answer of another fact of its relation."""
    facts = all_facts()
    answers: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        answers[fact.relation].append(fact.answer)
    rng = random.Random(0)
    edits = []
    for fact in rng.sample(facts, len(facts)):
        others = sorted(set(answers[fact.relation]) - {fact.answer})
        if others:
            edits.append({"prompt": fact.prompts[0], "subject": fact.subject, "target": rng.choice(others)})
    if count > len(edits):
        raise SystemExit(f"The demo's world has {len(edits)} facts to edit, not {count}; lower --rate or --seconds.")
    return edits[:count]


@dataclass
class Watched:
    """One posted edit: when, and when each replica first answered it rightly."""

    edit: dict[str, Any]
    posted: float
    right: dict[str, float] = field(default_factory=dict)


@dataclass
class Run:
    watched: list[Watched]
    killed: float | None
    replicas: int

    @property
    def lost(self) -> int:
        return sum(len(one.right) < self.replicas for one in self.watched)

    @property
    def seconds(self) -> list[float]:
        """From POST to the last replica's right answer."""
        return sorted(max(one.right.values()) - one.posted for one in self.watched if len(one.right) == self.replicas)

    @property
    def after_kill(self) -> float | None:
        """From the kill, or the POST where that came later, to the last right answer of all."""
        assert self.killed is not None
        waited = [
            max(one.right.values()) - max(self.killed, one.posted)
            for one in self.watched
            if len(one.right) == self.replicas
        ]
        return max(waited, default=None)


class Endpoint:
    def __init__(self, url: str, replicas: int) -> None:
        self._url, self._replicas = url, replicas
        self._asked: dict[str, tuple[str, bool]] = {}  # replica → its release that was asked, and whether for all

    def measure(self, edits: Sequence[dict[str, Any]], *, rate: float, at_half: Any = None) -> Run:
        watched: list[Watched] = []
        killed: list[float] = []

        def post(edit: dict[str, Any]) -> None:
            one = Watched(edit, time.monotonic())
            watched.append(one)  # one that is refused counts as lost
            requests.post(f"{self._url}/v1/edits", json=edit, timeout=120).raise_for_status()

        def post_all() -> None:
            """At their times, though one before is still under way."""
            start = time.monotonic()
            with ThreadPoolExecutor(POSTS_AT_ONCE) as pool:
                sent = []
                for index, edit in enumerate(edits):
                    time.sleep(max(0.0, start + index / rate - time.monotonic()))
                    if at_half is not None and index == len(edits) // 2:
                        at_half()
                        killed.append(time.monotonic())
                    sent.append(pool.submit(post, edit))
                for one in sent:
                    one.result()

        posting = threading.Thread(target=post_all)
        posting.start()
        deadline = None
        while deadline is None or time.monotonic() < deadline:
            if not posting.is_alive() and deadline is None:
                deadline = time.monotonic() + PATIENCE
            if deadline is not None and all(len(one.right) == self._replicas for one in watched):
                break
            self._look(list(watched), everything=deadline is not None)
            time.sleep(LOOK_SECONDS)
        posting.join()
        return Run(watched, killed[0] if killed else None, self._replicas)

    def _look(self, watched: Sequence[Watched], *, everything: bool) -> None:
        """Whichever replica it comes to; where that has another release than before, ask all what any of them owes."""
        headers = requests.get(f"{self._url}/v1/models", timeout=120).headers
        replica, release = headers[REPLICA_HEADER], headers[RELEASE_HEADER]
        if self._asked.get(replica) == (release, everything):
            return
        owed = sorted((one for one in watched if len(one.right) < self._replicas), key=lambda one: one.posted)
        asked = {replica: release}
        for start in range(0, len(owed), PROMPTS_PER_QUESTION):
            part = owed[start : start + PROMPTS_PER_QUESTION]
            answered = self._ask_all_replicas(part)
            asked = dict(asked.items() & answered.items()) if start else answered
            if not everything and not any(one.right for one in part):
                break
        self._asked |= {replica: (release, everything) for replica, release in asked.items()}

    def _ask_all_replicas(self, part: Sequence[Watched]) -> dict[str, str]:
        """The release of each that answered. Serve gives a request to the replica that has the least to do, and posts
        that wait are to do too: so what one has begun to answer is left to wait until another one is asked."""
        body = {"model": "wiseline", "prompt": [one.edit["prompt"] for one in part], "max_tokens": 24, "stream": True}
        answers: dict[str, requests.Response] = {}
        with ExitStack() as waiting:
            for _ in range(TRIES * self._replicas):
                answer = requests.post(f"{self._url}/v1/completions", json=body, timeout=120, stream=True)
                waiting.enter_context(answer)
                if answer.status_code == 200:
                    answers.setdefault(answer.headers[REPLICA_HEADER], answer)
                if len(answers) == self._replicas:
                    break
            for replica, answer in answers.items():
                texts = said(answer)
                now = time.monotonic()
                for index, one in enumerate(part):
                    if texts[index].strip() == one.edit["target"]:
                        one.right.setdefault(replica, now)
        return {replica: answer.headers[RELEASE_HEADER] for replica, answer in answers.items()}


def said(answer: requests.Response) -> dict[int, str]:
    """What a stream says, by prompt."""
    texts: dict[int, str] = defaultdict(str)
    for line in answer.iter_lines():
        event = line.removeprefix(b"data: ")
        for choice in json.loads(event).get("choices", ()) if event.startswith(b"{") else ():
            texts[choice["index"]] += choice["text"]
    return texts


def kill_the_trainer() -> None:
    """Of the Ray that this process started, and of no other."""
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("ray::LiveTrain"):
            os.kill(process.pid, signal.SIGKILL)
            return
    raise SystemExit("There is no trainer to kill.")


def summary(steady: Run, after: Run, options: argparse.Namespace) -> dict[str, Any]:
    seconds = steady.seconds
    percentiles = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else [float("nan")] * 99
    waited = after.after_kill
    return {
        "edits": len(steady.watched) + len(after.watched),
        "replicas": options.replicas,
        "rate": options.rate,
        "encoder": options.encoder,
        "p50_seconds": round(percentiles[49], 2),
        "p95_seconds": round(percentiles[94], 2),
        "max_seconds": round(seconds[-1], 2) if seconds else None,
        "after_kill_seconds": None if waited is None else round(waited, 2),
        "lost": steady.lost + after.lost,
        "load_average": round(os.getloadavg()[0], 1),
        "cpus": os.cpu_count(),
    }


if __name__ == "__main__":
    main()
