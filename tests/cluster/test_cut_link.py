"""A round on two hosts, each with a `ray start` of its own and with token authentication, whose link is cut for so long
that the head gives the other host up."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.hosts import Host, Switch, missing, supervised, two_hosts
from tests.cluster.tiny_rounds import release_bytes, settings, write_world

ROOT = Path(__file__).parents[2]
PORT = 6379
PATIENCE = 240  # seconds for one step, on a busy machine
# Ray's own: 5 s, 3 s, 10 s and 5 times, so up to a minute.
HEALTH_CHECKS = {"initial_delay_ms": 2000, "period_ms": 1000, "timeout_ms": 3000, "failure_threshold": 3}
NODES = """
import json, sys, ray
answers, sys.stdout = sys.stdout, sys.stderr  # Ray itself tells of the lost node
ray.init(address=sys.argv[1], log_to_driver=False)
for _ in sys.stdin:
    print(json.dumps([node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]), file=answers, flush=True)
"""


@dataclass
class Hosts:
    switch: Switch
    head: Host
    other: Host
    folder: Path

    @property
    def address(self) -> str:
        return f"{self.head.address}:{PORT}"

    def wiseline(self, *arguments: str, store: str) -> "subprocess.Popen[str]":
        """The command, on the head."""
        here = [*settings(self.folder, store=store), f"resources.ray_address={self.address}"]
        options = [word for setting in [*here, "resources.placement=SPREAD"] for word in ("--set", setting)]
        command = [sys.executable, "-m", "jobs.cli", *arguments, *options, "--json"]
        return self.head.start(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    @contextlib.contextmanager
    def alive(self) -> Iterator[Callable[[], list[str]]]:
        """Asks for the addresses of the nodes, as the head says then. It is connected before: that takes seconds."""
        command = [sys.executable, "-c", NODES, self.address]
        with self.head.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1) as asked:
            assert asked.stdin is not None and asked.stdout is not None
            stdin, stdout = asked.stdin, asked.stdout

            def ask() -> list[str]:
                stdin.write("\n")
                return sorted(json.loads(stdout.readline()))

            assert len(ask()) == 2
            try:
                yield ask
            finally:
                asked.kill()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if (reason := missing()) is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        **{f"RAY_health_check_{name}": str(value) for name, value in HEALTH_CHECKS.items()},
    }
    # A GPU each, which Ray believes in: a worker that waits gives its CPU away, and Ray would put the lost one there.
    ray_start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--num-gpus=1"]
    ray_start += ["--object-store-memory=80000000", "--disable-usage-stats"]
    with ExitStack() as stack:
        switch, head, other = stack.enter_context(two_hosts(environment))
        as_head = [f"--node-ip-address={head.address}", "--head", f"--port={PORT}", "--include-dashboard=false"]
        stack.enter_context(supervised(head, [*ray_start, *as_head], str(tmp_path / "head.log")))
        until(lambda: "Ray runtime started" in (tmp_path / "head.log").read_text())
        joins = [f"--node-ip-address={other.address}", f"--address={head.address}:{PORT}"]
        stack.enter_context(supervised(other, [*ray_start, *joins], str(tmp_path / "other.log")))
        until(lambda: "Ray runtime started" in (tmp_path / "other.log").read_text())
        yield Hosts(switch, head, other, tmp_path)


def until(reached: Callable[[], Any]) -> Any:
    ends = time.monotonic() + PATIENCE
    while not (answer := reached()):
        assert time.monotonic() < ends
        time.sleep(0.05)
    return answer


def ended(command: "subprocess.Popen[str]") -> dict[str, Any]:
    out, err = command.communicate(timeout=PATIENCE)
    assert command.returncode == 0, out + err
    said: dict[str, Any] = json.loads(out.splitlines()[-1])  # what Ray tells of the lost node is in err
    return said


def training(host: Host) -> list[psutil.Process]:
    """Those that compute, and do not wait for what the other host extracts."""
    found = []
    for one in host.processes(title="ray::Worker.train"):
        with contextlib.suppress(psutil.NoSuchProcess):
            if one.status() == psutil.STATUS_RUNNING:
                found.append(one)
    return found


def until_both_train(hosts: Hosts) -> None:
    """Whichever is first waits for the other, whose worker may start so late that nothing would be left for it."""
    first = until(lambda: training(hosts.head) or training(hosts.other))
    for worker in first:
        worker.send_signal(signal.SIGSTOP)
    until(lambda: all(host.processes(title="ray::Worker.train") for host in (hosts.head, hosts.other)))
    for worker in first:
        worker.send_signal(signal.SIGCONT)
    until(lambda: training(hosts.head) and training(hosts.other))


@pytest.mark.timeout(900)
def test_a_round_ends_with_the_same_release_though_the_link_was_cut(hosts: Hosts) -> None:
    edits = write_world(hosts.folder)
    ended(hosts.wiseline("ingest", str(edits), store="undisturbed"))
    shutil.copytree(hosts.folder / "undisturbed", hosts.folder / "cut")
    assert ended(hosts.wiseline("round", store="undisturbed"))["published"]

    stopped: set[psutil.Process] = set()

    def hold_the_head() -> None:
        """So that the round cannot end before the other host is back."""
        for worker in hosts.head.processes(title="ray::Worker"):
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.send_signal(signal.SIGSTOP)
                stopped.add(worker)

    with hosts.alive() as alive:
        command = hosts.wiseline("round", store="cut")
        until_both_train(hosts)
        hosts.switch.turn("down")
        hold_the_head()
        assert len(alive()) == 2, "nobody was told"
        until(lambda: alive() == [hosts.head.address])
    hosts.switch.turn("up")

    def the_other_trains_again() -> bool:
        hold_the_head()
        return any(worker.create_time() > healed for worker in training(hosts.other))

    healed = time.time()
    until(the_other_trains_again)
    for worker in stopped:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGCONT)
    assert ended(command)["published"]
    assert release_bytes(hosts.folder / "cut") == release_bytes(hosts.folder / "undisturbed")
