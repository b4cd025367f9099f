import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from pipeline.actors import cluster
from pipeline.actors.cluster import check_room, connect
from pipeline.config import ResourcesSection
from pipeline.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("local_ray")
def test_a_process_that_is_connected_stays_where_it_is() -> None:
    before = ray.get_runtime_context().get_node_id()
    connect(ResourcesSection(ray_address="203.0.113.1:6379"))
    assert ray.get_runtime_context().get_node_id() == before


SLOW_AGENTS = """
import os, pathlib, time
if b"agent.py" in pathlib.Path("/proc/self/cmdline").read_bytes() and os.path.exists(os.environ["SLOW"]):
    time.sleep(60)
"""
STARTS_TWICE = """
import os, pathlib, psutil
from pipeline.actors import cluster
from pipeline.config import ResourcesSection

def late(message, *values):
    pathlib.Path(os.environ["SLOW"]).unlink(missing_ok=True)
    print(message % values)

cluster.log.warning = late
cluster.connect(ResourcesSection())
servers = [one for one in psutil.Process().children(recursive=True) if one.name() == "gcs_server"]
print(len(cluster.ray.nodes()), len(servers))
"""


def test_a_local_ray_whose_agents_are_late_is_started_again(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_AGENTS)
    (tmp_path / "slow").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "SLOW": str(tmp_path / "slow"),
        "HOME": str(tmp_path),
    }
    ended = subprocess.run(
        [sys.executable, "-c", STARTS_TWICE], env=environment, capture_output=True, text=True, timeout=250, check=True
    )
    first, *_, last = ended.stdout.splitlines()
    assert (first, last) == ("Ray did not start in time, attempt 1 of 3.", "1 1")


@ray.remote(num_cpus=0, max_restarts=1, max_task_retries=1)
class Mortal:
    def ends_its_process_once(self, trace: Path) -> None:
        if not trace.exists():
            trace.touch()
            os._exit(1)

    def sleeps(self, trace: Path) -> None:
        trace.touch()
        time.sleep(600)


@pytest.mark.usefixtures("local_ray")
def test_what_ray_tells_by_itself_is_not_in_a_commands_output(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    killed, died = Mortal.remote(), Mortal.remote()
    call = killed.sleeps.remote(tmp_path / "sleeps")
    until((tmp_path / "sleeps").exists)
    ray.kill(killed)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(call, timeout=60)
    ray.get(died.ends_its_process_once.remote(tmp_path / "died"), timeout=60)
    out = err = ""

    def told() -> bool:
        nonlocal out, err
        now = capsys.readouterr()
        out, err = out + now.out, err + now.err
        return "A worker died" in out + err

    until(told)
    assert out == "" and "Task Mortal" not in err


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


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
