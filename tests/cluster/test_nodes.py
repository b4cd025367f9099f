"""Rounds on nodes with GPUs, which Ray believes in: every trainer has one of its own, a node that joins while a round
trains gets shards, and the shards of one that dies go to others."""

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from jobs.ingest_edits import ingest
from pipeline.actors.cluster import started_in_time
from pipeline.actors.worker_pool import WorkerPool
from pipeline.config import Config, load_config
from pipeline.models.base_model import identify
from pipeline.round_diary import Event, ShardNews
from pipeline.rounds import run_round
from tests.cluster.tiny_rounds import SHARDS, release_bytes, settings, write_world

pytestmark = pytest.mark.timeout(600)

NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 * 2**20}
STARTING = "default_worker.py"  # a process that has no title yet
HEALTH_CHECKS = {"initial_delay_ms": 2000, "period_ms": 1000, "timeout_ms": 5000, "failure_threshold": 3}


@dataclass
class Nodes:
    cluster: Cluster
    folder: Path
    stopped: list[psutil.Process] = field(default_factory=list)

    def config(self, store: str) -> Config:
        return load_config(overrides=[*settings(self.folder, store=store), "resources.placement=SPREAD"])

    def stop(self, *nodes: Any) -> None:
        """Also those that are starting, so that the test does not depend on who is faster."""
        self.stopped += [one for node in nodes for one in workers(node, "ray::Worker", "ray::IDLE", STARTING)]
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for one in self.stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two of them, the head with two GPUs; the edits are in a store `log`."""
    folder = tmp_path_factory.mktemp("nodes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in HEALTH_CHECKS.items():
            patch.setenv(f"RAY_health_check_{name}", str(value))
        head = NODE | {"num_gpus": 2, "num_cpus": 2, "include_dashboard": False}
        cluster = started_in_time(lambda: Cluster(initialize_head=True, head_node_args=head))
        try:
            started_in_time(lambda: cluster.add_node(**NODE))
            ray.init(address=cluster.address, log_to_driver=False)
            nodes = Nodes(cluster, folder)
            ingest(nodes.config("log"), [str(write_world(folder))])
            yield nodes
        finally:
            ray.shutdown()
            cluster.shutdown()


def device(worker: Any) -> tuple[str, str]:
    """Node and GPU, as the worker itself sees them; what torch would see must be the same."""

    def seen(_: Any) -> tuple[str, list[str], str | None]:
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_accelerator_ids()["GPU"], os.environ.get("CUDA_VISIBLE_DEVICES")

    node, ids, visible = ray.get(worker.__ray_call__.remote(seen))
    [gpu] = ids
    assert visible == gpu
    return node, gpu


def workers(node: Any, *titles: str) -> list[psutil.Process]:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    found = []
    for one in raylet.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now; or a zombie, which has no command line
            if any(title in " ".join(one.cmdline()) for title in titles):
                found.append(one)
    return found


def test_workers_are_spread_and_each_has_a_device_of_its_own(nodes: Nodes) -> None:
    config = nodes.config("log")
    with WorkerPool(config, model=identify(config.model)) as pool:
        spread = [device(worker) for worker in pool.stage(most=2, whole_model=True)]
        assert len({node for node, _ in spread}) == 2, "though the head has room for both"
        devices = [device(worker) for worker in pool.stage(most=SHARDS, whole_model=True)]
        assert len(devices) == len(set(devices)) == 3


def test_nodes_come_and_go_and_the_release_is_the_same(nodes: Nodes) -> None:
    for store in ("joined", "died"):
        shutil.copytree(nodes.folder / "log", nodes.folder / store)
    joined: list[Any] = []
    used: list[str] = []

    def a_node_joins(event: Event) -> None:
        """As soon as a shard trains. The first workers stand still until the new one trains, too."""
        if not isinstance(event, ShardNews) or used:
            return
        if not joined:
            nodes.stop(*nodes.cluster.list_all_nodes())
            joined.append(started_in_time(lambda: nodes.cluster.add_node(**NODE)))
        elif workers(joined[0], "ray::Worker.train"):
            used.append(event.shard.digest)
            nodes.go_on()
        else:  # a worker that had no process yet
            nodes.stop(*(node for node in nodes.cluster.list_all_nodes() if node is not joined[0]))

    assert run_round(nodes.config("joined"), observe=a_node_joins).published
    assert used

    died: list[str] = []

    def that_node_dies(event: Event) -> None:
        """While it trains. Other workers stand still until then."""
        if not isinstance(event, ShardNews) or died:
            return
        if workers(joined[0], "ray::Worker.train"):
            nodes.cluster.remove_node(joined[0], allow_graceful=False)
            died.append(event.shard.digest)
            nodes.go_on()
        elif not nodes.stopped:
            nodes.stop(*(node for node in nodes.cluster.list_all_nodes() if node is not joined[0]))

    nodes.stopped = []
    assert run_round(nodes.config("died"), observe=that_node_dies).published
    assert died
    assert release_bytes(nodes.folder / "died") == release_bytes(nodes.folder / "joined")
