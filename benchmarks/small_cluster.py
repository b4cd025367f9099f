"""A Ray cluster of three nodes on this machine, and nights that come every minute: for `benchmarks.drill`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from benchmarks.known_answers import DEMO
from pipeline.config import Config

NODE = {"num_cpus": 1, "object_store_memory": 150 * 2**20}
# Ray's own give a node up after a minute.
HEALTH_CHECKS = {"initial_delay_ms": 2000, "period_ms": 1000, "timeout_ms": 5000, "failure_threshold": 3}


@contextmanager
def three_nodes() -> Iterator[Cluster]:
    os.environ |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipeline.serving.carry_on.in_serves_proxy",
        "PYTHONPATH": str(DEMO.parent),
    } | {f"RAY_health_check_{name}": str(value) for name, value in HEALTH_CHECKS.items()}
    os.environ.pop("RAY_ADDRESS", None)
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 2, "include_dashboard": False})
    try:
        cluster.add_node(**NODE)
        cluster.add_node(**NODE)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def scheduled_rounds(config: Config, log: Path) -> Iterator[None]:
    """`wiseline schedule` as an operator runs it, with a night every minute."""
    file = log.with_suffix(".json")
    file.write_text(config.model_dump_json(), "utf-8")
    command = [sys.executable, "-m", "jobs.cli", "schedule", "--cron", "* * * * *", "--config", str(file)]
    with log.open("w") as out:
        schedule = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        yield
    finally:
        schedule.terminate()
        try:
            schedule.wait(60)
        except subprocess.TimeoutExpired:
            schedule.kill()


def trains(node: Any) -> bool:
    """Whether a worker of the node trains a shard now."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for worker in raylet.children():
        with suppress(psutil.Error):  # it has just ended
            if " ".join(worker.cmdline()).startswith("ray::Worker.train"):
                return True
    return False
