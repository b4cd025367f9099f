"""Ingesting a large stream beside reading and rewriting the same file: `python -m benchmarks.ingest [--json]`.

Random edits (prompt, target, subject, one rephrase; letters beyond ASCII in half of the names; 1 row in 1,000 is
refused and 1 in 100 supersedes an earlier one) lie in one JSONL and one Parquet file. `wiseline ingest` takes each
into an empty store on a local Ray that is up already. `speed_over_pyarrow`: the time of pyarrow alone (read_json or
read_table, then write_table, with a thread per CPU) over the time of `ingest`, whole calls; pyarrow is measured
before and after, in a process of its own, and the mean counts. On a busy machine the CPU seconds say more.
`peak_gib`: the most memory that the driver and all processes of its Ray held at once, shared pages counted once
(PSS), Ray's own daemons and its object store included. Sampled: private memory twice a second, the rest (object
store, mapped files) every 2.5 seconds.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

FORMATS = ("jsonl", "parquet")
SECONDS_BETWEEN_SAMPLES = 0.5
SAMPLES_BETWEEN_WALKS = 5  # a walk through the page tables of all processes costs as much as ingesting 50,000 rows
CHUNK_ROWS = 100_000
SYLLABLES = ("ka", "ri", "mo", "ten", "la", "vor", "shi", "el", "an", "dru", "ös", "né", "bar", "qui", "tho", "wen")
RELATIONS = (
    ("The mother tongue of {} is", "What language did {} grow up speaking at home?"),
    ("{} is located in the country of", "In which country would a visitor find {} today?"),
    ("{} plays the position of", "On the field, which position does {} usually take?"),
    ("The capital city of {} is", "Which city is the seat of government of {}?"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--folder", help="where files and stores go; default: a temporary one")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)  # this is one of the processes below
    options = parser.parse_args()
    if options.part:
        name, *arguments = options.part
        print(json.dumps({"write": write_files, "pyarrow": rewrite, "ingest": ingest_file}[name](*arguments)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        in_a_process("write", folder, str(options.rows))
        found = {kind: compared(folder, kind, options.rows) for kind in FORMATS}
    table = Table("file", "ingest s", "pyarrow s", "speed over pyarrow, at least 0.5", "peak GiB, at most 3", "daemons")
    table.add_column("CPU s of ingest")
    table.add_column("of pyarrow")
    for kind, one in found.items():
        keys = ("ingest_seconds", "pyarrow_seconds", "speed_over_pyarrow", "peak_gib", "daemons_gib")
        keys += ("ingest_cpu_seconds", "pyarrow_cpu_seconds")
        table.add_row(f"{options.rows} rows, {kind}", *(f"{one[key]:.2f}" for key in keys))
    Console().print(table)
    if options.json:
        worst = {
            "peak_gib": max(one["peak_gib"] for one in found.values()),
            "speed_over_pyarrow": min(one["speed_over_pyarrow"] for one in found.values()),
        }
        print(json.dumps(worst | found | {"load": os.getloadavg()[1]}))


def compared(folder: str, kind: str, rows: int) -> dict[str, float]:
    before = in_a_process("pyarrow", folder, kind)
    found: dict[str, float] = in_a_process("ingest", folder, kind, str(rows))
    after = in_a_process("pyarrow", folder, kind)
    pyarrow_seconds, pyarrow_cpu_seconds = ((one + other) / 2 for one, other in zip(before, after, strict=True))
    return found | {
        "pyarrow_seconds": pyarrow_seconds,
        "pyarrow_cpu_seconds": pyarrow_cpu_seconds,
        "speed_over_pyarrow": pyarrow_seconds / found["ingest_seconds"],
    }


def in_a_process(*part: str) -> Any:
    command = [sys.executable, "-m", "benchmarks.ingest", "--part", *part]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def write_files(folder: str, rows: str) -> None:
    writer = None
    with Path(folder, "edits.jsonl").open("w") as lines:
        for chunk in edits(int(rows)):
            lines.writelines(json.dumps(edit, ensure_ascii=False) + "\n" for edit in chunk)
            table = pa.Table.from_pylist(chunk)
            writer = writer or pq.ParquetWriter(Path(folder, "edits.parquet"), table.schema)
            writer.write_table(table)
    assert writer is not None
    writer.close()


def edits(rows: int) -> Iterator[list[dict[str, str]]]:
    draw = random.Random(0)

    def name() -> str:
        return "".join(draw.choices(SYLLABLES, k=draw.randint(2, 4))).title()

    for start in range(0, rows, CHUNK_ROWS):
        chunk = []
        for number in range(start, min(start + CHUNK_ROWS, rows)):
            # Whom an earlier row is about already, in the same words: its answer is superseded.
            again = number % 100 == 99
            subject = chunk[-50]["subject"] if again else f"{name()} {name()} {number}"
            prompt, rephrase = RELATIONS[(number - 50 if again else number) % len(RELATIONS)]
            target = "" if number % 1000 == 500 else f"{name()} {name()}"
            edit = {"prompt": prompt.format(subject), "target": target, "subject": subject}
            chunk.append(edit | {"rephrase": rephrase.format(subject)})
        yield chunk


def rewrite(folder: str, kind: str) -> tuple[float, float]:
    """Seconds that pyarrow alone takes, and of CPU."""
    import pyarrow.json as pj

    pa.set_cpu_count(os.cpu_count() or 1)  # OMP_NUM_THREADS would bind it
    source, target = Path(folder, f"edits.{kind}"), Path(folder, "rewritten.parquet")
    started, cpu_started = time.perf_counter(), time.process_time()
    pq.write_table(pj.read_json(source) if kind == "jsonl" else pq.read_table(source), target)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    target.unlink()
    return seconds, cpu_seconds


def ingest_file(folder: str, kind: str, rows: str) -> dict[str, float]:
    from jobs.ingest_edits import ingest
    from pipeline.actors.cluster import connect
    from pipeline.config import load_config

    # Where Ray's workers find this checkout.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    config = load_config(overrides=[f"store.uri={folder}/store-{kind}"])
    connect(config.resources)
    with Memory() as memory:
        started = time.perf_counter()
        report = ingest(config, [f"{folder}/edits.{kind}"])
        seconds = time.perf_counter() - started
    assert report.ingested + report.quarantined == report.rows == int(rows), report
    found = {"ingest_seconds": seconds, "ingest_cpu_seconds": memory.cpu_seconds}
    return found | {"peak_gib": memory.peak, "daemons_gib": memory.daemons}


class Memory:
    """GiB that this process and its descendants hold: the `peak`, and what was `daemons` of Ray in it; and what all of
    them took of the CPU, the sampling included."""

    def __enter__(self) -> "Memory":
        self.peak = self.daemons = 0.0
        self._cpu_before = {pid: cpu_seconds(pid) for pid in family(os.getpid())}
        self._cpu = dict(self._cpu_before)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._count_cpu(family(os.getpid()))
        self.cpu_seconds = sum(self._cpu.values()) - sum(self._cpu_before.values())

    def _count_cpu(self, pids: list[int]) -> None:
        self._cpu |= {pid: max(self._cpu.get(pid, 0.0), cpu_seconds(pid)) for pid in pids}

    def _watch(self) -> None:
        shared = daemons = 0.0
        for sample in itertools.count():
            if self._over.wait(SECONDS_BETWEEN_SAMPLES):
                return
            pids = family(os.getpid())
            self._count_cpu(pids)
            private = sum(gib(pid, "status", "RssAnon") for pid in pids)
            if sample % SAMPLES_BETWEEN_WALKS == 0:
                held = {pid: gib(pid, "smaps_rollup", "Pss") for pid in pids}
                shared = sum(held.values()) - private
                daemons = sum(one for pid, one in held.items() if pid != os.getpid() and not is_worker(pid))
            if private + shared > self.peak:
                self.peak, self.daemons = private + shared, daemons


def family(pid: int) -> list[int]:
    """The process and all its descendants."""
    try:
        children = Path(f"/proc/{pid}/task").glob("*/children")
        return [pid, *(one for file in children for child in file.read_text().split() for one in family(int(child)))]
    except OSError:
        return []


def gib(pid: int, file: str, field: str) -> float:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{field}:")), 0.0)


def cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system


def is_worker(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::")
    except OSError:
        return False


if __name__ == "__main__":
    main()
