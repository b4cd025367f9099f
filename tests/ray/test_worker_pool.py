"""A pool in a cluster that has less room than it says."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipeline.actors.worker_pool import WorkerPool
from pipeline.config import load_config
from pipeline.models.base_model import identify
from tests.ray.processes import pids_of
from tests.tiny_world import save_model

pytestmark = pytest.mark.usefixtures("local_ray")


@ray.remote(num_cpus=1)
class Neighbour:
    """Somebody else's actor, such as a replica of the endpoint."""

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture
def neighbour() -> Iterator[None]:
    actor = Neighbour.remote()
    ray.get(actor.pid.remote())
    yield
    ray.kill(actor)


@pytest.mark.usefixtures("neighbour")
def test_a_call_to_a_worker_that_died_ends_though_another_one_took_its_place(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    config = load_config(
        overrides=[f"model.path={folder}", f"store.uri={tmp_path / 'store'}", "resources.cpus_per_trainer=1"]
    )
    with WorkerPool(config, model=identify(config.model)) as pool:
        first, second = pool.stage(most=2, whole_model=True)  # one place is left for the two
        ray.get(first.ready.remote(), timeout=60)
        assert not ray.wait([second.ready.remote()], timeout=2)[0]
        (pid,) = pids_of("ray::Worker")
        os.kill(pid, signal.SIGKILL)
        ray.get(second.ready.remote(), timeout=120)
        call = first.ready.remote()
        assert not ray.wait([call], timeout=2)[0]
        assert pool.stage(most=1, whole_model=True) == [first]
        ray.get(call, timeout=120)
