import socket
import time

import pytest
import ray

from pipeline.actors import cluster
from pipeline.actors.cluster import check_room, connect
from pipeline.config import ResourcesSection
from pipeline.errors import ConfigError


@pytest.mark.usefixtures("local_ray")
def test_a_process_that_is_connected_stays_where_it_is() -> None:
    before = ray.get_runtime_context().get_node_id()
    connect(ResourcesSection(ray_address="203.0.113.1:6379"))
    assert ray.get_runtime_context().get_node_id() == before


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize("variable", [False, True])
def test_an_address_where_nobody_answers_is_a_sentence_soon(
    monkeypatch: pytest.MonkeyPatch, scheme: str, variable: bool
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", address)
    started = time.monotonic()
    with pytest.raises(ConfigError, match="No Ray cluster answers"):
        connect(ResourcesSection(ray_address=None if variable else address))
    assert time.monotonic() - started < 5


@pytest.mark.usefixtures("local_ray")
def test_a_trainer_that_this_machine_can_never_hold_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_room(ResourcesSection())
    with pytest.raises(ConfigError, match="cpus_per_trainer is 500 and this machine has"):
        check_room(ResourcesSection(cpus_per_trainer=500))
    with pytest.raises(ConfigError, match="gpus_per_trainer is 99 and this machine has"):
        check_room(ResourcesSection(gpus_per_trainer=99))
