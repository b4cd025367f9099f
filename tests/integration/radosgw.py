"""A real S3 server on loopback: Ceph's mon, one OSD in memory and radosgw, as processes of their own.

Uses the binaries on PATH, else those that install_radosgw.sh unpacked. Needs no root; every port is a free one, every
file lies under one folder, and `running` ends exactly the processes it started.
"""

import contextlib
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.ports import free_ports

ACCESS_KEY = "wiseline"
SECRET_KEY = "wiseline-secret"
START_SECONDS = 90


def unpacked_root() -> Path:
    """Where install_radosgw.sh unpacks the packages."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("WISELINE_RADOSGW") or cache / "wiseline" / "radosgw")


@dataclass(frozen=True)
class Ceph:
    """Where the binaries are, and the environment that makes them run."""

    root: Path

    @classmethod
    def found(cls) -> "Ceph | None":
        if all(shutil.which(name) for name in ("radosgw", "ceph-mon", "ceph-osd", "ceph")):
            return cls(Path("/"))
        return cls(unpacked_root()) if (unpacked_root() / "complete").exists() else None

    @property
    def libraries(self) -> Path:
        return next(self.root.glob("usr/lib/*/rados-classes")).parent

    @property
    def python(self) -> Path:
        """Debian's own interpreter, which is unpacked with the rest where the machine has none."""
        installed = Path("/usr/bin/python3")
        return installed if installed.exists() else self.root / "usr/bin/python3"

    @property
    def environment(self) -> dict[str, str]:
        if self.root == Path("/"):
            return dict(os.environ)
        below = self.libraries
        folders = (below, below / "ceph", self.root / "lib" / below.name)
        return os.environ | {
            "LD_LIBRARY_PATH": ":".join(map(str, folders)),
            "PYTHONPATH": str(self.root / "usr/lib/python3/dist-packages"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def command(self, name: str, configuration: Path, *arguments: str) -> list[str]:
        program = str(self.root / "usr/bin" / name)
        # The `ceph` tool is a Python program for Debian's own interpreter.
        start = [str(self.python), program] if name == "ceph" else [program]
        return [*start, "-c", str(configuration), *arguments]


@contextlib.contextmanager
def running(folder: Path, ceph: Ceph) -> Iterator[str]:
    """Start the server with everything under `folder`; yields its endpoint URL, and ends it when the block ends."""
    mon_v2, mon_v1, gateway = free_ports(3)
    identity = str(uuid.uuid4())
    monitors = f"[v2:127.0.0.1:{mon_v2},v1:127.0.0.1:{mon_v1}]"
    configuration = folder / "ceph.conf"
    for name in ("mon", "osd", "gateway", "log", "run"):
        (folder / name).mkdir(parents=True)
    configuration.write_text(_configuration(folder, ceph, identity, monitors, gateway))

    def run(name: str, *arguments: str) -> None:
        command = ceph.command(name, configuration, *arguments)
        subprocess.run(command, env=ceph.environment, check=True, capture_output=True, timeout=START_SECONDS)

    with contextlib.ExitStack() as daemons:

        def start(name: str, *arguments: str) -> None:
            daemons.enter_context(_daemon(ceph, name, ceph.command(name, configuration, "-f", *arguments), folder))

        monmap = str(folder / "monmap")
        run("monmaptool", "--create", "--addv", "a", monitors, "--fsid", identity, monmap)
        run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        start("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        run("ceph", "osd", "new", osd)
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        start("ceph-osd", "-i", "0")
        user = ["--uid", "tests", "--display-name", "tests", "--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY]
        run("radosgw-admin", "user", "create", *user)
        start("radosgw", "-n", "client.rgw")
        endpoint = f"http://127.0.0.1:{gateway}"
        _wait_until(lambda: _answers(endpoint), f"radosgw does not answer; see {folder / 'log'}")
        yield endpoint


@contextlib.contextmanager
def _daemon(ceph: Ceph, name: str, command: Sequence[str], folder: Path) -> Iterator[None]:
    with (folder / "log" / f"{name}.out").open("wb") as output:
        process = subprocess.Popen(command, env=ceph.environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _configuration(folder: Path, ceph: Ceph, identity: str, monitors: str, gateway: int) -> str:
    libraries = ceph.libraries
    return f"""
[global]
fsid = {identity}
mon host = {monitors}
mon initial members = a
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
ms bind ipv6 = false
# Without it radosgw hangs: get_initial_auth_request returned -13.
ms mon client mode = crc
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd objectstore = memstore
memstore device bytes = 2147483648
osd memory target = 939524096
plugin dir = {libraries}/ceph
osd class dir = {libraries}/rados-classes
erasure code dir = {libraries}/ceph/erasure-code
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/gateway
run dir = {folder}/run
admin socket = {folder}/run/$name.$pid.asok
log file = {folder}/log/$name.log
pid file =
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{gateway}
"""


def _answers(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(endpoint, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _wait_until(ready: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(0.1)
