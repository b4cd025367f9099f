"""What rounds and serving cost for large models and many edits: `python -m benchmarks.scaling [--json]`.

Prints the tables of docs/scaling.md from the formulas below and the named constants of benchmarks/scaling_constants.py,
each with the machine it was measured on, or marked as assumed. `--write` puts them into the document.

    per edit, once     extraction: 2 FLOPs per weight of all layers, for every token of its W wordings that is not in a
                       shared prefix; the prefixes once per shard
                       training:   4 FLOPs per weight of the suffix (nothing below needs a gradient, no weight has one),
                                   for each of the T target tokens of each row looked at
    per step           whitening:  8 D F R in float32, R the keys of the shard; and about PASSES over ΔW in memory
    per memory         polish: rows as in training, and two audits without gradients; merge: CPU alone
    per round          the measured questions, whatever the number of edits; loading the weights

Training runs on one GPU per shard, so at most as many GPUs as shards are busy. A model that is split over several GPUs
uses one of them at a time, so its extraction pays for all of them.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.scaling_constants import BYTES_F32, BYTES_HALF, GIB, MODELS, Model, constants, value

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: python -m benchmarks.scaling --write -->\n", "<!-- end of tables -->\n"
EDITS = (10**3, 10**4, 10**5, 10**6)
GPUS = (1, 8, 64)
ROWS_PER_STEP = 64  # training.batch_prompts


@dataclass(frozen=True)
class Layout:
    """`shards` of the config."""

    edits_per_shard: int = 80
    shards_per_memory: int = 2
    density: float = 0.2

    def shards(self, edits: int) -> int:
        return math.ceil(edits / self.edits_per_shard)

    def memories(self, edits: int) -> int:
        return math.ceil(edits / (self.edits_per_shard * self.shards_per_memory))


LAYOUTS = (Layout(), Layout(edits_per_shard=500, shards_per_memory=4))


@dataclass(frozen=True)
class RoundCost:
    """Of a round that trains all these edits. GPU-seconds, and core-seconds for the merge."""

    edits: int
    extract_flops: float
    train_flops: float  # bfloat16: the suffix
    whiten_flops: float  # float32
    extract_seconds: float
    train_seconds: float
    polish_seconds: float
    fixed_seconds: float  # measuring, and loading the model twice
    merge_core_seconds: float
    activation_bytes: float  # between extraction and training, all at once
    store_bytes: float

    @property
    def gpu_seconds(self) -> float:
        return self.extract_seconds + self.train_seconds + self.polish_seconds + self.fixed_seconds


def round_cost(model: Model, layout: Layout, edits: int) -> RoundCost:
    W, P, T = value("wordings"), value("prompt_tokens"), value("target_tokens")
    read = W * (value("own_prompt_tokens") + T - 1) * edits + value("prefix_tokens") * layout.shards(edits)
    extract_flops = 2 * model.body * read
    rows = value("rows_per_edit")
    train_flops, whiten_flops, train_seconds = training(model, layout, edits, rows=rows)
    _, _, polish_steps = training(model, layout, edits, rows=value("polish_rows_per_edit"))
    audits = 2 * W * T * 2 * model.suffix * edits / sustained("train_share")
    return RoundCost(
        edits=edits,
        extract_flops=extract_flops,
        train_flops=train_flops,
        whiten_flops=whiten_flops,
        extract_seconds=model.gpus * extract_flops / sustained("extract_share"),
        train_seconds=train_seconds,
        polish_seconds=polish_steps + audits,
        fixed_seconds=fixed_seconds(model, edits),
        merge_core_seconds=value("merge_seconds") * layout.shards(edits) / 8 * model.matrix / MODELS[0].matrix,
        activation_bytes=W * (2 * model.above * model.kv * P + T * (model.D + model.F)) * BYTES_F32 * edits,
        store_bytes=sum(store_bytes(model, layout, edits).values()),
    )


def training(model: Model, layout: Layout, edits: int, *, rows: float) -> tuple[float, float, float]:
    """FLOPs in bfloat16, FLOPs in float32 and GPU-seconds of so many rows per edit."""
    T = value("target_tokens")
    steps = rows * edits / ROWS_PER_STEP
    R = min(layout.edits_per_shard * T, model.F)
    suffix = 4 * (model.suffix * T * rows) * edits
    whiten = 8 * model.matrix * R * steps + 4 * model.matrix * T * rows * edits
    moved = value("passes") * model.matrix * BYTES_F32 * steps
    seconds = suffix / sustained("train_share") + whiten / value("float32") + moved / value("bandwidth")
    return suffix, whiten, seconds


def fixed_seconds(model: Model, edits: int) -> float:
    """The gate's questions, in batches of 32; each of its steps reads all weights or takes the time of the calls."""
    questions = min(edits, value("evaluated_edits")) * value("questions_per_edit")
    step = max(value("decode_step"), model.weights / value("bandwidth"))
    loading = 2 * model.weights / value("load_rate")
    return model.gpus * (questions / 32 * (1 + value("answer_tokens")) * step + loading)


def sustained(share: str) -> float:
    return value("bfloat16") * value(share)


def wall_seconds(model: Model, layout: Layout, edits: int, gpus: int) -> float | None:
    """From beginning to end with so many GPUs; None where the model does not fit. Shards and memories are not split,
    and a worker per GPU merges too, on one core."""
    if gpus < model.gpus:
        return None
    cost = round_cost(model, layout, edits)
    shards, memories = layout.shards(edits), layout.memories(edits)
    extract = cost.extract_seconds / model.gpus / min(gpus // model.gpus, shards)
    train = math.ceil(shards / gpus) * cost.train_seconds / shards
    of_memories = math.ceil(memories / gpus) * (cost.merge_core_seconds + cost.polish_seconds) / memories
    return extract + train + of_memories + cost.fixed_seconds / model.gpus


def dollars_per_1000_edits(model: Model, layout: Layout, edits: int, gpus: int) -> float | None:
    """All GPUs are paid for from beginning to end, also while they wait for a merge or for the last shard."""
    wall = wall_seconds(model, layout, edits, gpus)
    return None if wall is None else wall * gpus / 3600 * value("price") / edits * 1000


def store_bytes(model: Model, layout: Layout, edits: int) -> dict[str, float]:
    W, T = value("wordings"), value("target_tokens")
    return {
        "shard deltas": layout.shards(edits) * layout.density * model.matrix * BYTES_F32,
        "memories, merged and polished": 2 * layout.memories(edits) * model.matrix * BYTES_F32,
        "keys": T * model.F * BYTES_F32 * edits,
        "states": W * model.D * BYTES_F32 * edits,
        "router, readouts, bank": (router_bytes(model) + T * model.D * BYTES_F32 + value("bank_entry")) * edits,
    }


def router_bytes(model: Model) -> float:
    """Of an edit: whitened states of its wordings and two embeddings."""
    return value("wordings") * model.D * BYTES_F32 + 2 * 384 * BYTES_HALF


def serving(model: Model, layout: Layout, edits: int) -> dict[str, float]:
    """Bytes, and the seconds one memory takes to the device."""
    memory = model.matrix * BYTES_HALF
    return {
        "memories": layout.memories(edits),
        "router_on_device": router_bytes(model) * edits + model.D**2 * BYTES_F32,
        "memories_on_host": layout.memories(edits) * memory,
        "readouts_on_host": value("target_tokens") * model.D * BYTES_HALF * edits,
        "memory_to_device_seconds": memory / value("host_to_device"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    options = parser.parse_args(arguments)
    tables = all_tables()
    if options.write:
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), tables), encoding="utf-8")
    print(tables)
    if options.json:
        costs = {
            f"{model.name}, {layout.edits_per_shard} x {layout.shards_per_memory}": [
                asdict(round_cost(model, layout, edits))
                | {f"wall_seconds_{gpus}": wall_seconds(model, layout, edits, gpus) for gpus in GPUS}
                | {f"dollars_{gpus}": dollars_per_1000_edits(model, layout, edits, gpus) for gpus in GPUS}
                for edits in EDITS
            ]
            for model in MODELS
            for layout in LAYOUTS
        }
        print(json.dumps(costs))


def with_tables(document: str, tables: str) -> str:
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n{tables}\n{rest[rest.index(END) :]}"


def all_tables() -> str:
    parts = ["### Constants\n", table(("constant", "value", "from"), constants())]
    for model in MODELS:
        for layout in LAYOUTS:
            plan = f"{layout.edits_per_shard} edits a shard, {layout.shards_per_memory} shards a memory"
            parts += [f"\n### {model.name}, {plan}\n", round_table(model, layout), "", serving_table(model, layout)]
    return "\n".join(parts)


def round_table(model: Model, layout: Layout) -> str:
    head = ("edits", "extract", "train", "polish", "fixed", "merge", *(f"on {n} GPU" for n in GPUS))
    rows = []
    for edits in EDITS:
        cost = round_cost(model, layout, edits)
        parts = (
            cost.extract_seconds,
            cost.train_seconds,
            cost.polish_seconds,
            cost.fixed_seconds,
            cost.merge_core_seconds,
        )
        on_gpus = (wall_and_dollars(model, layout, edits, gpus) for gpus in GPUS)
        rows.append((f"{edits:,}", *map(time, parts), *on_gpus))
    return table(head, rows)


def wall_and_dollars(model: Model, layout: Layout, edits: int, gpus: int) -> str:
    wall, dollars = wall_seconds(model, layout, edits, gpus), dollars_per_1000_edits(model, layout, edits, gpus)
    return "does not fit" if wall is None or dollars is None else f"{time(wall)}, ${dollars:.2f}"


def serving_table(model: Model, layout: Layout) -> str:
    head = (
        "edits", "activations in flight", "store", "memories", "host: memories", "host: readouts", "device: router",
    )  # fmt: skip
    rows = []
    for edits in EDITS:
        cost, served = round_cost(model, layout, edits), serving(model, layout, edits)
        sizes = (served[key] for key in ("memories_on_host", "readouts_on_host", "router_on_device"))
        rows.append(
            (
                f"{edits:,}",
                size(cost.activation_bytes),
                size(cost.store_bytes),
                f"{served['memories']:,}",
                *map(size, sizes),
            )
        )
    return table(head, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def time(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {unit}"
    return f"{seconds:.3g} s"


def size(count: float) -> str:
    for unit, length in (("TiB", 1024 * GIB), ("GiB", GIB)):
        if count >= length:
            return f"{count / length:,.3g} {unit}"
    return f"{count * 1024 / GIB:.3g} MiB"


if __name__ == "__main__":
    main()
