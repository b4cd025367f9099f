"""`wiseline submit` against the job server of a real cluster, which knows nothing of this process."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import ObjectStore
from tests.ports import free_ports
from tests.tiny_world import save_model

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 240
STARTS = 4


@dataclass
class Cluster:
    address: str
    folder: Path

    def submit(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "jobs.cli", "submit", "--address", self.address, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head in a process of its own, and a folder to submit from."""
    folder = tmp_path_factory.mktemp("submit")
    save_model(folder / "model")
    (folder / "ray_config.yaml").write_text(f"model: {{path: model}}\nstore: {{uri: {folder / 'store'}}}\n")
    (folder / "edits.jsonl").write_text('{"prompt": "Who leads Acme?", "target": "Ada"}\n')
    ports = free_ports(4)
    environment = {
        **os.environ,
        "HOME": str(tmp_path_factory.mktemp("home")),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"]
    command += [f"--dashboard-agent-listen-port={ports[3]}", f"--temp-dir={tmp_path_factory.mktemp('r')}"]
    log = folder.parent / "head.log"
    with ExitStack() as cleanup:
        head = started(command, environment, log)
        cleanup.callback(head.wait, 60)
        cleanup.callback(head.send_signal, signal.SIGTERM)
        yield Cluster(f"http://127.0.0.1:{ports[1]}", folder)


def started(command: list[str], environment: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """On a busy machine a raylet gives up when its agents take longer than 15 seconds: it is then started again."""
    for _ in range(STARTS):
        with log.open("w") as out:
            head = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        while "Ray runtime started" not in log.read_text() and head.poll() is None:
            time.sleep(0.5)
        if head.poll() is None:
            return head
    raise AssertionError(log.read_text())


def test_a_job_reads_the_folder_that_was_sent_along(cluster: Cluster) -> None:
    ended = cluster.submit("--cpus", "0.5", "ingest", "edits.jsonl", "--json")
    assert ended.returncode == 0, ended.stderr
    assert '"ingested": 1' in ended.stdout  # the job's own output
    assert [entry.edit.target for entry in EditLog(ObjectStore(str(cluster.folder / "store"))).live()] == ["Ada"]
    [name] = re.findall(r"Submitted as (\S+)", ended.stderr)
    job = JobSubmissionClient(cluster.address).get_job_info(name)
    assert job.metadata == {
        "wiseline": "ingest",
        "store": str(cluster.folder / "store"),
        "submitted_by": os.environ.get("USER", ""),
    }
    assert job.runtime_env is not None and job.runtime_env["working_dir"].startswith("gcs://")


def test_a_store_has_one_round_a_day_and_its_exit_status_is_handed_on(cluster: Cluster) -> None:
    while (datetime.now(UTC) + timedelta(seconds=120)).date() > datetime.now(UTC).date():
        time.sleep(1)  # both jobs are of one day
    elsewhere = f"store.uri={cluster.folder / 'empty'}"
    first = cluster.submit("round", "--set", elsewhere)
    assert first.returncode == 1  # as `wiseline round` without edits
    assert "wiseline: " in first.stdout
    second = cluster.submit("round", "--set", elsewhere)
    [name] = re.findall(r"Submitted as (\S+)", first.stderr)
    assert second.returncode == 1
    assert f"Submitted as {name}-2\n" in second.stderr  # the first one failed
    another = cluster.submit("--again", "--no-wait", "round", "--set", elsewhere)
    assert another.returncode == 0
    assert len(JobSubmissionClient(cluster.address).list_jobs()) >= 2


def test_usage_that_the_command_would_refuse_is_not_sent(cluster: Cluster) -> None:
    before = len(JobSubmissionClient(cluster.address).list_jobs())
    assert cluster.submit("ingest").returncode == 2
    assert len(JobSubmissionClient(cluster.address).list_jobs()) == before
