"""How much two trainers are faster than one: `python -m benchmarks.parallel [--json]`.

Two rounds of the same four shards on the closed world, each in a store of its own: with one trainer, then with two. No
shard stops early, so both do the same steps. Measured is the rounds' training phase, with the start of the trainers in
it.

    speedup             seconds with one trainer / seconds with two
    parallel_fraction   p of Amdahl's law, 1 / speedup = (1 − p) + p / 2
    slowdown            how much longer a shard takes beside another one: what they share (memory, caches) limits them
    serial_seconds      what is left when shards take all the time there is: starts, hand-over, the last shard alone
"""

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.closed_world import WORLD
from jobs.ingest_edits import ingest
from pipeline.actors.cluster import start_local
from pipeline.config import Config, load_config
from pipeline.round_diary import Event, ShardNews
from pipeline.rounds import run_round

EDITS, SHARDS, CPUS = 200, 4, 2


@dataclass
class ShardClock:
    """Seconds from a shard's first news to its last."""

    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        if isinstance(event, ShardNews):
            self.first.setdefault(event.shard.digest, perf_counter())
            self.last[event.shard.digest] = perf_counter()

    @property
    def seconds(self) -> float:
        return sum(self.last[digest] - self.first[digest] for digest in self.first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=WORLD)
    parser.add_argument("--steps", type=int, default=1000, help="per shard")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    start_local(num_cpus=CPUS, log_to_driver=False)
    one, in_one = train(options.world, trainers=1, steps=options.steps)
    two, in_two = train(options.world, trainers=2, steps=options.steps)
    speedup = one / two
    figures = {
        "one_trainer_seconds": one,
        "two_trainers_seconds": two,
        "speedup": speedup,
        "parallel_fraction": 2 * (1 - 1 / speedup),
        "slowdown": in_two / in_one,
        "serial_seconds": two - in_two / 2,
    }
    table = Table("", "value", title=f"{SHARDS} shards of {EDITS // SHARDS} edits, {options.steps} steps each")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.2f}")
    Console().print(table)
    if options.json:
        print(json.dumps(figures))


def train(world: Path, *, trainers: int, steps: int) -> tuple[float, float]:
    """Seconds of the training phase, and of all shards together."""
    clock = ShardClock()
    with tempfile.TemporaryDirectory() as folder:
        config = settings(world, folder, trainers=trainers, steps=steps)
        file = Path(folder) / "edits.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows(world)))
        ingest(config, [str(file)])
        result = run_round(config, observe=clock)
    return result.report["seconds"]["train"], clock.seconds


def settings(world: Path, folder: str, *, trainers: int, steps: int) -> Config:
    return load_config(
        overrides=[
            f"model.path={world}",
            f"store.uri={folder}/store",
            f"shards.edits_per_shard={EDITS // SHARDS}",
            "shards.shards_per_memory=1",
            f"training.max_steps={steps}",
            "training.stop_loss=1e-9",
            "merge.polish_steps=0",
            "round.min_reliability=0",
            "round.min_generalization=0",
            "round.min_locality=0",
            "round.evaluate_edits=1",
            f"resources.cpus_per_trainer={CPUS / trainers}",
            "resources.stages=apart",  # the router would be fitted beside them
        ]
    )


def rows(world: Path) -> list[dict[str, Any]]:
    """Without paraphrases and locality prompts: nothing is asked here."""
    lines = (world / "edits.jsonl").read_text().splitlines()[:EDITS]
    return [{key: json.loads(line)[key] for key in ("prompt", "target_new", "subject")} for line in lines]


if __name__ == "__main__":
    main()
