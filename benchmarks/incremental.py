"""What a round costs when little changed: `python -m benchmarks.incremental [--edits 10000] [--json]`.

CounterFact edits on the demo model, in a temporary store: a first round over all of them, `wiseline round` again with
nothing changed, then one percent changed (half of them new, three tenths superseded, one fifth retracted) and a second
round.

    second_over_first     seconds that trainers spent on shards and memories in the second round over those in the
                          first; `elapsed_second_over_first` is that of the phases train, merge and polish by the clock
                          on the wall, with the start of actors in it. The whole rounds, and which phase took what, are
                          beside it.
    untouched_same_bytes  did every shard of the first plan that is in the second one keep its delta to the byte, and
                          was none of them trained again?
    unchanged_seconds     the command with nothing changed, from the start of its process to its end

How many steps edits take to hold depends on model and data, and is not what is asked here: every shard does `--steps`
steps and every memory half as many, none stops early, 100 edits are asked and the gate is open. `--as-configured`
leaves all that to the config, gate aside: this model knows nothing of CounterFact, so its paraphrases are not reached.
With `--set shards.edits_per_shard=500` 10,000 edits are 20 shards.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.ingest_edits import ingest
from pipeline.actors.cluster import start_local
from pipeline.config import Config, load_config
from pipeline.edits import normalise
from pipeline.round_diary import Event, MemoryNews, PhaseStarted
from pipeline.rounds import RoundResult, run_round
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.training.shard_files import delta_path

ROOT = Path(__file__).parents[1]
TRAINING = ("train", "merge", "polish")
NEW, SUPERSEDED, RETRACTED = 0.005, 0.003, 0.002  # of the edits
GATE_OPEN = [f"round.min_{score}=0" for score in ("reliability", "generalization", "locality")]
CPUS = 2

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/counterfact/counterfact-edit.json")
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=40, help="of every shard; a memory's polish does half as many")
    parser.add_argument("--as-configured", action="store_true", help="train until edits hold, and ask 1,000 of them")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    rows = json.loads(options.data.read_text())[: options.edits]
    start_local(num_cpus=CPUS, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        steps = None if options.as_configured else options.steps
        figures = measure(settings(Path(folder), steps=steps, overrides=options.set), rows, folder=Path(folder))
    table = Table("", "value", title=f"{len(rows)} edits, then {len(changed(rows))} changed")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if options.json:
        print(json.dumps(figures))


def settings(folder: Path, *, steps: int | None, overrides: Sequence[str]) -> Config:
    fixed = [
        "training.stop_loss=1e-9",
        f"training.max_steps={steps}",
        f"merge.polish_steps={(steps or 0) // 2}",
        "round.evaluate_edits=100",
    ]
    return load_config(
        overrides=[
            f"model.path={ROOT / 'demo' / 'model'}",
            f"store.uri={folder / 'store'}",
            "resources.cpus_per_trainer=1",
            *GATE_OPEN,
            *(fixed if steps is not None else []),
            *overrides,
        ]
    )


@dataclass
class TrainerClock:
    """Steps of every shard and memory and what they took; prints the phases, since the first round takes minutes."""

    first: dict[object, tuple[float, int]] = field(default_factory=dict)
    last: dict[object, tuple[float, int]] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseStarted):
            print(f"{datetime.now():%H:%M:%S} {event.name}: {event.detail}", file=sys.stderr, flush=True)
        elif event.progress is not None:
            worked_on = event.memory if isinstance(event, MemoryNews) else event.shard.digest
            self.first.setdefault(worked_on, (perf_counter(), event.progress.step))
            self.last[worked_on] = (perf_counter(), event.progress.step)

    @property
    def seconds(self) -> float:
        """The first news of a shard comes after its first pass, so its steps are taken to be like the later ones."""
        pairs = [(self.first[worked_on], self.last[worked_on]) for worked_on in self.first]
        timed = sum(last - first for (_, first), (_, last) in pairs)
        if not timed:
            sys.exit("No shard was trained for two passes: give more --steps.")
        return sum(last - first for (first, _), (last, _) in pairs) / timed * self.steps

    @property
    def steps(self) -> int:
        return sum(step for _, step in self.last.values())


def measure(config: Config, rows: Sequence[Row], *, folder: Path) -> dict[str, Any]:
    ingest(config, [written(folder / "edits.jsonl", rows)])
    in_first, in_second = TrainerClock(), TrainerClock()
    started = perf_counter()
    first = run_round(config, observe=in_first)
    first_seconds = perf_counter() - started
    store = open_store(config.store)
    before = deltas(store, first)
    unchanged_seconds = seconds_of_command(config, folder)
    ingest(config, [written(folder / "changes.jsonl", changed(rows))])
    started = perf_counter()
    second = run_round(config, observe=in_second)
    second_seconds = perf_counter() - started
    after = deltas(store, second)
    found = {shard["digest"] for shard in second.report["shards"] if shard["reused"]}
    kept = before.keys() & after.keys()
    return {
        "second_over_first": in_second.seconds / in_first.seconds,
        "elapsed_second_over_first": elapsed(second) / elapsed(first),
        "untouched_same_bytes": kept == found and all(before[digest] == after[digest] for digest in kept),
        "unchanged_seconds": unchanged_seconds,
        "first_round_seconds": first_seconds,
        "second_round_seconds": second_seconds,
        "shards": len(before),
        "shards_trained_again": len(after.keys() - kept),
        "steps": [in_first.steps, in_second.steps],
        "edits_trained_again": sum(shard["edits"] for shard in second.report["shards"] if not shard["reused"]),
        "first_phases": first.report["seconds"],
        "second_phases": second.report["seconds"],
        "first_scores": first.release.scores,
        "second_scores": second.release.scores,
    }


def elapsed(result: RoundResult) -> float:
    return sum(float(result.report["seconds"].get(phase, 0)) for phase in TRAINING)


def deltas(store: ObjectStore, result: RoundResult) -> dict[str, str]:
    """Checksum of every delta of the round's plan, by its shard."""
    digests = [shard["digest"] for shard in result.report["shards"]]
    return {digest: hashlib.sha256(store.read(delta_path(digest))).hexdigest() for digest in digests}


def seconds_of_command(config: Config, folder: Path) -> float:
    """Of `wiseline round`, in a process of its own. It must not publish."""
    file = folder / "config.yaml"
    file.write_text(config.model_dump_json())  # every JSON text is YAML
    started = perf_counter()
    command = [sys.executable, "-m", "jobs.cli", "round", "--config", str(file), "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds = perf_counter() - started
    assert not json.loads(ended.stdout.splitlines()[-1])["published"], ended.stdout
    return seconds


def changed(rows: Sequence[Row]) -> list[Row]:
    """One percent of changes: new edits ask what others' locality prompts ask, superseded ones get another's answer."""
    rng = random.Random(0)
    new, superseded, retracted = (round(share * len(rows)) for share in (NEW, SUPERSEDED, RETRACTED))
    chosen = rng.sample(rows, superseded + retracted)
    asked = {normalise(row["prompt"]) for row in rows}
    unasked = {normalise(row["locality_prompt"]): row for row in rows if normalise(row["locality_prompt"]) not in asked}
    answers = sorted({row["target_new"] for row in rows})
    return [
        *({"prompt": row["locality_prompt"], "target_new": row["target_new"]} for row in [*unasked.values()][:new]),
        *(
            row | {"target_new": rng.choice([answer for answer in answers if answer != row["target_new"]])}
            for row in chosen[:superseded]
        ),
        *({"op": "retract", "prompt": row["prompt"], "subject": row["subject"]} for row in chosen[superseded:]),
    ]


def written(file: Path, rows: Sequence[Row]) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(file)


if __name__ == "__main__":
    main()
