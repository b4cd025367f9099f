"""Merging one memory beside reading its deltas and writing the result: `python -m benchmarks.merge [--json]`.

8 random deltas of 4096 x 11008 (Llama-2-7B's down_proj) at ρ = .2 lie in a temporary store, as a round leaves them; 8
disjoint masks of that size do not fit, so they overlap. One process merges them as a round does. `peak_gib`: the most
memory that process held until the merged file was stored, imports included. `time_over_io`: its time over that of
reading the same files and writing the same result with nothing between, with as many threads, measured in turns in the
same process; medians. The default is Ties with its trim; a round's default is `--density auto`, which trims nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pipeline.config import Config, load_config
from pipeline.storage.deltas import (
    DeltaMetadata,
    DeltaRows,
    SideMemory,
    StoredDelta,
    block_rows,
    decode_memory,
    encode_delta,
    encode_memory,
)
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.training.memory import merge_memory
from pipeline.training.planning import MemoryPlan, ShardPlan
from pipeline.training.shard_files import delta_path, shard_mask, write_keys

K, D, F, RHO = 8, 4096, 11008, 0.2
KEYS = 256  # of each shard; `keyed` alone reads them
MEMORY = MemoryPlan(
    digest="benchmark",
    seed=0,
    shards=tuple(ShardPlan(digest=f"shard-{index}", index=index, edits=()) for index in range(K)),
    live=frozenset(),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--method", default="ties")
    parser.add_argument("--density", default="0.53", help="share of the trained entries that trimming keeps, or auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--merge-in", metavar="FOLDER", help=argparse.SUPPRESS)  # this is the process that merges
    options = parser.parse_args()
    if options.merge_in:
        config = config_in(options.merge_in, options)
        torch.set_num_threads(config.training.threads)  # as pipeline/actors/merger.py does
        print(json.dumps(measured(open_store(config.store), config, turns=options.turns)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_shards(open_store(config_in(folder, options).store))
        command = [sys.executable, "-m", "benchmarks.merge", *sys.argv[1:], "--merge-in", folder]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    table = Table("merged by", "seconds", "reading and writing alone", "ratio, at most 3", "peak GiB, at most 1.5")
    keys = ("merge_seconds", "io_seconds", "time_over_io", "peak_gib")
    table.add_row(f"{options.method}, density {options.density}", *(f"{found[key]:.2f}" for key in keys))
    Console().print(table)
    if options.json:
        print(json.dumps(found))


def config_in(folder: str, options: argparse.Namespace) -> Config:
    merge = [f"merge.method={options.method}", f"merge.density={options.density}"]
    return load_config(overrides=[f"store.uri={folder}", f"training.threads={options.threads}", *merge])


def write_shards(store: ObjectStore) -> None:
    random = np.random.default_rng(0)
    for shard in MEMORY.shards:
        metadata = DeltaMetadata(
            model_fingerprint="benchmark",
            layer=27,
            seed=MEMORY.seed,
            mask_index=shard.index,
            mask_count=K,
            masks="overlapping",
            density=RHO,
            dtype="float32",
            edits_digest=shard.digest,
            config_digest="benchmark",
            rows=D,
            columns=F,
        )
        row_lengths = shard_mask(metadata).sum(dim=1).numpy().astype(np.int32)
        values = random.standard_normal(int(row_lengths.sum()), dtype=np.float32) * np.float32(1e-3)
        store.put(delta_path(shard.digest), encode_delta(metadata, DeltaRows(values, row_lengths)))
        write_keys(store, shard, bare=[], chat_MF=torch.randn(KEYS, F), prefixed_MF=torch.zeros(0, F))


def measured(store: ObjectStore, config: Config, *, turns: int) -> dict[str, float]:
    merging, moving, peaks = [], [], []
    for _ in range(turns):
        seconds, merged = timed(lambda: merge_memory(store, MEMORY, config=config))
        merging.append(seconds)
        peaks.append(peak_gib())
        result = decode_memory(store.read(merged.path))
        seconds, _ = timed(lambda result=result: read_and_write(store, result, threads=config.training.threads))
        moving.append(seconds)
        store.remove(merged.path)
        store.remove("result")
    return {
        "peak_gib": peaks[0],  # later ones have seen the whole result
        "time_over_io": median(merging) / median(moving),
        "merge_seconds": median(merging),
        "io_seconds": median(moving),
    }


def peak_gib() -> float:
    """Of this program; getrusage would give the parent's where that held more."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20


def read_and_write(store: ObjectStore, result: SideMemory, *, threads: int) -> None:
    def read(shard: ShardPlan) -> None:
        with store.open(delta_path(shard.digest)) as file:
            for _ in StoredDelta(file).blocks(block_rows(F)):
                pass

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, MEMORY.shards))
    store.put("result", encode_memory(result))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
