"""What a round on the demo costs, by phase: `python -m benchmarks.round_phases [--json]`.

One run in a temporary store, actors started cold. Wall-clock seconds: compare phases of one run, not runs.
"""

import argparse
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.ingest_edits import ingest
from pipeline.config import load_config
from pipeline.rounds import run_round

DEMO = Path(__file__).parents[1] / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(overrides=[f"model.path={DEMO / 'model'}", f"store.uri={folder}", *options.set])
        ingest(config, [str(DEMO / "edits.jsonl")])
        result = run_round(config)
        stored = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    edits = result.release.edits
    seconds = result.report["seconds"]
    table = Table("phase", "seconds", "per edit")
    for phase, taken in seconds.items():
        table.add_row(phase, f"{taken:.1f}", f"{taken / edits:.3f}")
    table.add_row("all", f"{sum(seconds.values()):.1f}", f"{sum(seconds.values()) / edits:.3f}")
    Console().print(table)
    Console().print(f"{edits} edits, {stored / edits / 1024:.0f} KiB stored per edit, scores {result.release.scores}")
    if options.json:
        print(
            json.dumps({"edits": edits, "seconds": seconds, "bytes_per_edit": stored // edits, **result.release.scores})
        )


if __name__ == "__main__":
    main()
