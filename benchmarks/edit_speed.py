"""Seconds per edit beside plain WISE: `python -m benchmarks.edit_speed [--json]`.

The same edits of the closed world by `benchmarks/reference_wise.py` (one process, one edit after another, 11 context
rows as published, the whole model in every step) at 10 and at 70 steps, and by a whole round on Ray: extraction,
training, merge, polish and router, one memory of 4 shards. One thread per process everywhere.

Counted is what is done for edits. What either needs before the first edit is left out on both sides: loading the model
there, workers that start and load it here (`start_seconds`). So is the evaluation, and publishing.

    speedup_70, speedup_10   the reference's seconds per edit over the round's
    whole_round_seconds      with the workers' start, which a round of few edits mostly consists of
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.closed_world import WORLD
from benchmarks.reference_wise import run as reference_wise
from jobs.ingest_edits import ingest
from pipeline.config import load_config
from pipeline.rounds import run_round

SHARDS = 4
FOR_EDITS = ("extract", "train", "merge", "polish", "route")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=WORLD)
    parser.add_argument("--n", type=int, default=200, help="edits")
    parser.add_argument("--reference-edits", type=int, help="fewer for the reference, whose every edit costs the same")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (options.world / "edits.jsonl").read_text().splitlines()][: options.n]
    round_ = default_round(options.world, rows)
    reference = {
        steps: reference_wise(str(options.world), rows[: options.reference_edits], steps=steps, variant="merge")
        for steps in (10, 70)
    }
    figures = round_ | {"reference_edits": reference[10]["n"]}
    for steps, found in reference.items():
        figures[f"reference_{steps}_s_per_edit"] = found["s_per_edit"]
        figures[f"reference_{steps}_reliability"] = found["rel_em"]
        figures[f"speedup_{steps}"] = found["s_per_edit"] / round_["s_per_edit"]
    show(figures)
    if options.json:
        print(json.dumps(figures))


def default_round(world: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            overrides=[
                f"model.path={world}",
                f"store.uri={folder}/store",
                f"shards.edits_per_shard={-(-len(rows) // SHARDS)}",
                f"shards.shards_per_memory={SHARDS}",
                "training.threads=1",
                "round.min_reliability=0",
                "round.min_generalization=0",
                "round.min_locality=0",
                f"round.evaluate_edits={len(rows)}",
            ]
        )
        file = Path(folder) / "edits.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        ingest(config, [str(file)])
        result = run_round(config)
    seconds = result.report["seconds"]
    return {
        "edits": len(rows),
        "reliability": result.release.scores["reliability"],
        "s_per_edit": sum(seconds[phase] for phase in FOR_EDITS) / len(rows),
        "seconds": seconds,
        "start_seconds": seconds["start"],
        "whole_round_seconds": sum(seconds.values()),
    }


def show(figures: dict[str, Any]) -> None:
    table = Table("", "s per edit", "reliability", "times faster")
    table.add_row("a round", f"{figures['s_per_edit']:.4f}", f"{figures['reliability']:.3f}", "")
    for steps in (10, 70):
        seconds, reliability = figures[f"reference_{steps}_s_per_edit"], figures[f"reference_{steps}_reliability"]
        table.add_row(
            f"plain WISE, {steps} steps", f"{seconds:.3f}", f"{reliability:.3f}", f"{figures[f'speedup_{steps}']:.1f}"
        )
    Console().print(table)
    phases = ", ".join(f"{phase} {taken:.1f}" for phase, taken in figures["seconds"].items())
    Console().print(f"Seconds of the round: {phases}")


if __name__ == "__main__":
    main()
