"""Hosts of a test: network namespaces at one switch, which can be switched off. Needs root and the tool `ip`.

A host has its own loopback, addresses and ports; files and process ids are the machine's. With the switch off packets
vanish, as behind a cable that was pulled further away: nobody is told.
"""

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import psutil

STOP_SECONDS = 60


def missing() -> str | None:
    """Why there can be no hosts here."""
    if shutil.which("ip") is None:
        return "no tool `ip`: run tests/cluster/install_ip.sh"
    tried = subprocess.run(["ip", "netns", "add", _name("try")], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces: {tried.stderr.strip()}"
    _ip("netns", "del", _name("try"))
    return None


@dataclass(frozen=True)
class Host:
    namespace: str
    address: str
    environment: Mapping[str, str]

    def start(self, command: Sequence[str], **options: object) -> "subprocess.Popen[str]":
        inside = ["ip", "netns", "exec", self.namespace, *command]
        return subprocess.Popen(inside, env=dict(self.environment), text=True, **options)  # type: ignore[call-overload, no-any-return]

    def processes(self, *, title: str = "") -> list[psutil.Process]:
        found = []
        for pid in _ip("netns", "pids", self.namespace).split():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(int(pid))
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
        return found


@dataclass(frozen=True)
class Switch:
    namespace: str

    def turn(self, state: str) -> None:
        """`down` or `up`."""
        _ip("-n", self.namespace, "link", "set", "switch", state)


@contextlib.contextmanager
def two_hosts(environment: Mapping[str, str]) -> Iterator[tuple[Switch, Host, Host]]:
    switch = Switch(_name("s"))
    hosts = [Host(_name(letter), f"10.213.0.{number}", environment) for number, letter in ((1, "a"), (2, "b"))]
    with contextlib.ExitStack() as cleanup:
        for namespace in (switch.namespace, *(host.namespace for host in hosts)):
            _ip("netns", "add", namespace)
            cleanup.callback(_ip, "netns", "del", namespace)
        _ip("-n", switch.namespace, "link", "add", "switch", "type", "bridge")
        switch.turn("up")
        for host in hosts:
            port = ["peer", "name", host.namespace, "netns", switch.namespace]
            _ip("link", "add", "eth0", "netns", host.namespace, "type", "veth", *port)
            _ip("-n", switch.namespace, "link", "set", host.namespace, "up", "master", "switch")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", link, "up")
            cleanup.callback(_end_processes, host)
        yield switch, *hosts


@contextlib.contextmanager
def supervised(host: Host, command: Sequence[str], log: str) -> Iterator[None]:
    """The command, started again whenever it ends, as systemd and KubeRay do."""
    running: list[subprocess.Popen[str]] = []
    over = threading.Event()

    def start() -> None:
        with open(log, "a") as out:
            running.append(host.start(command, stdout=out, stderr=out))

    def supervise() -> None:
        while running[-1].wait() is not None and not over.is_set():
            start()

    start()
    thread = threading.Thread(target=supervise)
    thread.start()
    try:
        yield
    finally:
        over.set()
        running[-1].terminate()
        thread.join(STOP_SECONDS)


def _end_processes(host: Host) -> None:
    """Whatever is left in the namespace is the test's."""
    for process in host.processes():
        with contextlib.suppress(psutil.Error):
            process.kill()
    while host.processes():
        time.sleep(0.05)


def _name(suffix: str) -> str:
    return f"wl{os.getpid()}{suffix}"


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
