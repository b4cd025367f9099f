"""Edits on the closed world, as issue 3 asks: `python -m benchmarks.closed_world [--json] [--tune]`.

Per seed and size: one memory per shard (retrieve), and all shards in one memory by the keyed merge and by Ties-Merge,
each a whole round. Beside the data set's own locality prompts every edit brings two harder kinds, made of
`facts.jsonl`: what else is known of its subject, as far as no edit changes it, and its own question about entities kept
for evaluation.

`--tune` runs the same on entities that neither an edit nor a locality prompt of the evaluation is about (220 to 249,
120 facts, with new answers): settings are to be chosen there.
"""

import argparse
import json
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.evaluate import Setting, evaluate

WORLD = Path(__file__).parents[2] / "shared" / "peer" / "closed_world_1k"
LAYOUTS = {
    "retrieve": {"variant": "retrieve"},
    "keyed": {"variant": "merge", "merge": "keyed"},
    "ties": {"variant": "merge", "merge": "ties"},
}
LOCALITY_ENTITIES = range(150, 220)  # those before them carry the edits
TUNING_ENTITIES = range(220, 250)
NEIGHBOURS = 2  # prompts of the same relation per edit
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=WORLD)
    parser.add_argument("--sizes", default="200x4,520x8", help="edits x shards, separated by commas")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--tune", action="store_true", help="on facts that are not evaluated")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    rows: list[Row] = []
    for size in options.sizes.split(","):
        n, shards = map(int, size.split("x"))
        edits = (tuning_edits if options.tune else edits_with_locality)(options.world, n)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "edits.jsonl"
            file.write_text("".join(json.dumps(edit) + "\n" for edit in edits))
            for layout in options.layouts.split(","):
                for seed in map(int, options.seeds.split(",")):
                    setting = Setting(
                        model=options.world,
                        preset=options.preset,
                        shards=shards,
                        seed=seed,
                        overrides=tuple(options.set),
                        **LAYOUTS[layout],  # type: ignore[arg-type]
                    )
                    rows.append({"layout": layout, **evaluate(setting, file)})
                    show(rows[-1:], title=f"seed {seed}")
    show(rows, title="means over seeds, and the worst")
    if options.json:
        print(json.dumps({"rows": rows}))


def edits_with_locality(world: Path, n: int) -> list[Row]:
    """The first n edits of the data set with the harder locality prompts."""
    edits = [json.loads(line) for line in (world / "edits.jsonl").read_text().splitlines()][:n]
    facts = [json.loads(line) for line in (world / "facts.jsonl").read_text().splitlines()]
    neighbours = [fact for fact in facts if fact["ent"] in LOCALITY_ENTITIES]
    return [edit | {"locality": locality(edit, edits, facts, neighbours)} for edit in edits]


def tuning_edits(world: Path, n: int, *, seed: int = 0) -> list[Row]:
    """n facts of the tuning entities, with another answer of the same relation each."""
    facts = [json.loads(line) for line in (world / "facts.jsonl").read_text().splitlines()]
    rng = random.Random(seed)
    free = [fact for fact in facts if fact["ent"] in TUNING_ENTITIES]
    answers: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        answers[fact["relation"]].append(fact["answer"])
    edits = [
        {
            "prompt": fact["prompts"][0],
            "target_new": rng.choice([answer for answer in answers[fact["relation"]] if answer != fact["answer"]]),
            "subject": fact["subject"],
            "relation": fact["relation"],
            "rephrase": fact["prompts"][1],
            "rephrase2": fact["prompts"][2],
        }
        for fact in rng.sample(free, min(n, len(free)))
    ]
    edited = {edit["prompt"] for edit in edits}
    neighbours = [fact for fact in free if fact["prompts"][0] not in edited]
    return [edit | {"locality": locality(edit, edits, facts, neighbours)} for edit in edits]


def locality(edit: Row, edits: Sequence[Row], facts: Sequence[Row], neighbours: Sequence[Row]) -> list[Row]:
    """Other facts of the subject that no edit changes, in phrasings that no edit has, and the edit's question about
    neighbours."""
    edited = {(other["subject"], other["relation"]) for other in edits}
    # A release calibrates on edited questions asked of other subjects; the first phrasing may be among them.
    untouched = [
        fact
        for fact in facts
        if fact["subject"] == edit["subject"] and (fact["subject"], fact["relation"]) not in edited
    ]
    same_relation = [fact for fact in neighbours if fact["relation"] == edit["relation"]]
    chosen = random.Random(edit["prompt"]).sample(same_relation, min(NEIGHBOURS, len(same_relation)))
    return [
        *({"prompt": prompt, "kind": "same_subject"} for fact in untouched for prompt in fact["prompts"][1:]),
        *({"prompt": fact["prompts"][0], "kind": "same_relation"} for fact in chosen),
    ]


def show(rows: Sequence[Row], *, title: str) -> None:
    kinds = ("same_subject", "same_relation")
    table = Table("layout", "edits", "rel", "gen", "loc", "same subj.", "same rel.", "FP", "FN", "s/edit", title=title)
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["layout"], row["n"]].append(row)
    for (layout, n), group in groups.items():
        scores = [[row[key] for row in group] for key in ("rel_em", "gen_em", "loc_em")]
        scores += [[row["loc_em_by_kind"].get(kind) for row in group] for kind in kinds]
        wrong = [[row[key] for row in group] for key in ("route_fpr", "route_fnr")]
        cells = [summary(values, worst=min) for values in scores] + [summary(values, worst=max) for values in wrong]
        table.add_row(layout, str(n), *cells, f"{statistics.mean(row['s_per_edit'] for row in group):.2f}")
    Console(width=120).print(table)


def summary(values: Sequence[float | None], *, worst: Callable[[list[float]], float]) -> str:
    """Mean and worst; a dash where no prompt was asked, as with all 120 tuning facts edited."""
    asked = [value for value in values if value is not None]
    return f"{statistics.mean(asked):.3f} ({worst(asked):.3f})" if asked else "-"


if __name__ == "__main__":
    main()
