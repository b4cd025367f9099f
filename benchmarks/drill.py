"""Three nights of a cluster and a new base model, in minutes: `python -m benchmarks.drill`.

A Ray cluster of three nodes on this machine, an endpoint of two replicas, and `wiseline schedule` with a round due
every minute. Three streams of the demo's edits come in, one a night: with bad rows; with retractions and edits that
replace others; and one in whose round a worker's node gets a kill -9 and another one joins. Then a round trains the log
into another base model, and the endpoint is switched to it. Clients ask all the time.

    failed      requests that raised, or streams that ended without saying why; of clients with retries and without
    mixed       answers that are not, to the character, what the release that they name answers alone
                (the two models answer nearly alike, so that a mixture of these two would hardly show)
    wrong       of all edits that the log holds at the end: those that the endpoint answers otherwise
    lingering   of all retracted ones: those that are not answered as the base model does
"""

import argparse
import asyncio
import json
import shutil
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from benchmarks.hot_swap import judge, load, table
from benchmarks.known_answers import DEMO, Question, demo_rows, questions, right_answers
from benchmarks.small_cluster import NODE, scheduled_rounds, three_nodes, trains
from jobs.ingest_edits import ingest
from jobs.serve import running_endpoint, switch_endpoint
from pipeline.config import Config, load_config
from pipeline.models.base_model import load_base_model
from pipeline.rounds import run_round
from pipeline.serving.release_headers import REPLICA_HEADER
from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import open_store
from pipeline.storage.releases import OfModel, head, newest_first

CLIENTS = 2  # that never pause; a machine of two cores is to do rounds beside them
REPLICAS = 2
NIGHT_SECONDS = 900
MOST_TOKENS = 24
ASKED = (0, 9, 21, 70, 90, 130, 150, 190)  # among them a retracted and a replaced one, and some of every night


@dataclass
class Night:
    what: str
    ingested: dict[str, int]
    release: int = 0
    seconds: float = 0.0  # from the end of the ingestion to the release


@dataclass
class Drill:
    cluster: Cluster
    config: Config
    folder: Path
    serving: Config = field(init=False)
    nights: list[Night] = field(default_factory=list)
    retracted: list[str] = field(default_factory=list)  # prompts

    def run(self) -> None:
        rows = demo_rows()
        taken_back = [{"op": "retract", "prompt": row["prompt"], "subject": row["subject"]} for row in rows[8:20]]
        replaced = [{**row, "target_new": _another(row, rows)} for row in rows[20:26]]
        with scheduled_rounds(self.config, self.folder / "schedule.log"):
            self.night("bad rows", rows[:80], also=[str(DEMO / "bad_rows.jsonl")])
            self.retracted = [row["prompt"] for row in taken_back]
            self.night("retractions", [*rows[80:140], *taken_back, *replaced])
            self.night("a node is killed", rows[140:200], disaster=True)
        self.switch()

    def night(
        self, what: str, rows: Sequence[dict[str, Any]], *, also: Sequence[str] = (), disaster: bool = False
    ) -> None:
        file = self.folder / f"night-{len(self.nights)}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        report = ingest(self.config, [str(file), *also])
        counts = ("ingested", "quarantined", "superseded", "retracted")
        night = Night(what, {name: getattr(report, name) for name in counts})
        began = time.monotonic()
        if disaster:
            self.kill_a_node()
        store = open_store(self.config.store)
        assert report.log_version is not None
        while (newest := head(store)) is None or newest.log_version < report.log_version:
            self.look(began)
        night.release, night.seconds = newest.number, time.monotonic() - began
        self.nights.append(night)
        print(f"Night {len(self.nights)}: release {night.release} after {night.seconds:.0f} s", flush=True)

    def switch(self) -> None:
        """As docs/operations.md has it: a round with the new model beside the served one, then the endpoint."""
        began = time.monotonic()
        model = self.config.model.model_copy(update={"path": str(another_model(self.folder / "model"))})
        wanted = self.config.model_copy(update={"model": model})
        release = run_round(wanted).release
        trained = time.monotonic()
        self.serving = switch_endpoint(self.config, wanted)
        night = Night("another base model", dict.fromkeys(self.nights[0].ingested, 0), release.number, trained - began)
        self.nights.append(night)
        print(f"Switched {time.monotonic() - trained:.0f} s after release {release.number}", flush=True)

    def kill_a_node(self) -> None:
        """The node on which a shard is training; then one that takes its place."""
        began = time.monotonic()
        while not (training := [node for node in self.cluster.worker_nodes if trains(node)]):
            self.look(began)
        self.cluster.remove_node(training[0], allow_graceful=False)
        self.cluster.add_node(**NODE)

    def look(self, began: float) -> None:
        log = (self.folder / "schedule.log").read_text("utf-8")
        if "exit status" in log or time.monotonic() - began > NIGHT_SECONDS:
            raise SystemExit(f"A round failed, or did not end:\n{log}")
        time.sleep(0.1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, three_nodes() as cluster:
        folder = Path(temporary)
        config = load_config(overrides=settings(folder, cluster.address))
        drill = Drill(cluster, config, folder)
        asked = questions([demo_rows()[index] for index in ASKED])
        with running_endpoint(config) as url:
            over = threading.Event()
            with ThreadPoolExecutor(1) as beside:  # Ray starts and ends nodes from the main thread alone
                asked_all_the_time = load(url, asked, threading.Thread(target=over.wait), clients=CLIENTS)
                asking = beside.submit(asyncio.run, asked_all_the_time)
                try:
                    drill.run()
                finally:
                    over.set()
                outcomes = asking.result()
            wait_for(url, drill.nights[-1].release)
            figures = against_the_log(url, config, drill.retracted)
        right = right_answers_of_both(config, drill.serving, asked)
        figures |= judge(outcomes, right, {number: number for number in right})
        figures |= {"seconds": time.monotonic() - began}
    console = Console()
    console.print(nights_table(drill.nights))
    console.print(table(figures, title="The endpoint, all the time"))
    if options.json:
        print(json.dumps({**figures, "nights": [vars(night) for night in drill.nights]}))
    if any(figures[name] for name in ("failed", "mixed", "wrong", "lingering")):
        raise SystemExit(1)


def settings(folder: Path, address: str) -> list[str]:
    shards = ["shards.edits_per_shard=20", "router.signals=[keys, subject]"]
    endpoint = [f"serve.replicas={REPLICAS}", "serve.port=0", "serve.live_edits=false"]
    where = [f"store.uri={folder / 'store'}", f"resources.ray_address={address}", "resources.placement=SPREAD"]
    return [f"model.path={DEMO / 'model'}", *where, *shards, *endpoint]


def another_model(folder: Path) -> Path:
    """The demo model with its weights rounded to bfloat16: nearly the same answers, and another fingerprint."""
    shutil.copytree(DEMO / "model", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    model.save_pretrained(folder)
    return folder


def right_answers_of_both(first: Config, second: Config, asked: Sequence[Question]) -> dict[int, list[str]]:
    """By release; 0 is the first model without any."""
    store = open_store(first.store)
    right: dict[int, list[str]] = {}
    for config in (first, second):
        base = load_base_model(config.model)
        own = [one.number for one in newest_first(store, OfModel(base.fingerprint, base.layer))]
        right |= right_answers(config, base, asked, releases=own if right else [0, *own])
    return right


def _another(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """A target of the same relation that the row does not have."""
    others = {one["target_new"] for one in rows if one["relation"] == row["relation"]}
    return str(min(others - {row["target_new"], row["ground_truth"]}))


def against_the_log(url: str, config: Config, retracted: Sequence[str]) -> dict[str, Any]:
    """Every edit of the log and every retracted one, asked once more."""
    wanted = {entry.edit.prompt: entry.edit.target for entry in EditLog(open_store(config.store)).live()}
    said = ask_all(url, list(wanted))
    wrong = [prompt for prompt, target in wanted.items() if said[prompt] != target]
    for prompt in wrong:
        print(f"wrong: {prompt} {said[prompt]}, not {wanted[prompt]}")
    main, now = ask_all(url, retracted, {"x-wiseline-route": "off"}), ask_all(url, retracted)
    lingering = sum(main[prompt] != now[prompt] for prompt in retracted)
    return {"edits": len(wanted), "wrong": len(wrong), "retracted": len(retracted), "lingering": lingering}


def ask_all(url: str, prompts: Sequence[str], headers: dict[str, str] | None = None) -> dict[str, str]:
    answers = {}
    for start in range(0, len(prompts), 32):
        batch = list(prompts[start : start + 32])
        body = json.dumps({"model": "wiseline", "prompt": batch, "max_tokens": MOST_TOKENS}).encode()
        request = urllib.request.Request(
            f"{url}/v1/completions", body, {"content-type": "application/json", **(headers or {})}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            for choice in json.load(response)["choices"]:
                answers[batch[choice["index"]]] = choice["text"].strip()
    return answers


def wait_for(url: str, release: int) -> None:
    """Until every replica answered with it: a request that names the release waits for the replica that it reaches."""
    seen: set[str] = set()
    for _ in range(200):
        headers = {"content-type": "application/json", "x-wiseline-min-release": str(release)}
        body = json.dumps({"model": "wiseline", "prompt": "x", "max_tokens": 1}).encode()
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/v1/completions", body, headers), timeout=120
        ) as said:
            seen.add(said.headers[REPLICA_HEADER])
        if len(seen) == REPLICAS:
            return
    raise SystemExit(f"Of {REPLICAS} replicas {len(seen)} answered with release {release}.")


def nights_table(nights: Sequence[Night]) -> Table:
    rows = Table("", *nights[0].ingested, "release", "seconds to it", title="What happened")
    for night in nights:
        rows.add_row(night.what, *map(str, night.ingested.values()), str(night.release), f"{night.seconds:.0f}")
    return rows


if __name__ == "__main__":
    main()
