"""The night's RayJob, against an API server that does what the real one does: a stand-in, as none can be had here."""

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster import nightly_rayjob
from cluster.nightly_rayjob import RayJobs, of_the_day, watch
from tests.unit.cluster.conftest import named
from tests.unit.cluster.test_kuberay import problems

TEMPLATE = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "wiseline-round", "uid": "1", "labels": {"a": "b"}},
    "spec": {"suspend": True, "entrypoint": "wiseline round"},
    "status": {"jobDeploymentStatus": "Suspended"},
}

CUT_SHORT = -1


class ApiServer(ThreadingHTTPServer):
    """Jobs by name; each read of a created one takes the next of `statuses`, the last one stays. A number is an
    error, CUT_SHORT an answer that breaks off."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.jobs: dict[str, dict[str, Any]] = {"wiseline-round": TEMPLATE}
        self.statuses: list[dict[str, str] | int] = []
        self.tokens: set[str | None] = set()


class Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if name not in self.server.jobs:
            return self.reply(404, {})
        status: dict[str, str] | int = {}
        if name != "wiseline-round" and self.server.statuses:
            status = self.server.statuses[0]
            if len(self.server.statuses) > 1:
                self.server.statuses.pop(0)
        if status == CUT_SHORT:
            self.send_response(200)
            self.send_header("content-length", "1000")
            return self.end_headers()
        if isinstance(status, int):
            return self.reply(status, {})
        return self.reply(200, {"status": status, **self.server.jobs[name]})

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["content-length"])))
        name = job["metadata"]["name"]
        assert self.path == "/apis/ray.io/v1/namespaces/here/rayjobs"
        if name in self.server.jobs:
            return self.reply(409, {})
        self.server.jobs[name] = job
        return self.reply(201, job)

    def reply(self, code: int, body: dict[str, Any]) -> None:
        self.server.tokens.add(self.headers["authorization"])
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def jobs(server: ApiServer, tmp_path: Path) -> RayJobs:
    (tmp_path / "token").write_text("secret\n")
    return RayJobs(f"http://127.0.0.1:{server.server_port}", "here", tmp_path / "token", tls=None)


def night(jobs: RayJobs, monkeypatch: pytest.MonkeyPatch, day: str = "2026-11-21") -> object:
    monkeypatch.setattr(nightly_rayjob, "in_cluster", lambda: jobs)
    monkeypatch.setattr(nightly_rayjob, "POLL_SECONDS", 0.0)
    monkeypatch.setattr("sys.argv", ["nightly", "--template", "wiseline-round", "--day", day])
    monkeypatch.setattr(nightly_rayjob, "watch", lambda jobs, name: watch(jobs, name, poll_seconds=0.0))
    with pytest.raises(SystemExit) as ended:
        nightly_rayjob.main()
    return ended.value.code


def test_the_nights_job_is_the_template_awake() -> None:
    template = named("cpu", "RayJob") | {"metadata": {"name": "wiseline-round", "resourceVersion": "7", "uid": "9"}}
    job = of_the_day(template, day="2026-11-21", owner={"name": "wiseline-nightly-1", "uid": "4"})
    assert job["spec"] == template["spec"] | {"suspend": False}
    assert job["metadata"]["name"] == "wiseline-round-2026-11-21"
    assert job["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "wiseline-nightly-1", "uid": "4"}
    ]
    del job["metadata"]["ownerReferences"]
    assert problems(job) == ()


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ([{}, {"jobDeploymentStatus": "Running"}, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}], 0),
        ([{"jobDeploymentStatus": "Retrying"}, {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}], 1),
        ([503, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}], 0),  # the API server was away
        ([429, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}], 0),  # or has too much to do
        ([CUT_SHORT, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}], 0),
    ],
)
def test_the_outcome_is_the_rounds(
    server: ApiServer,
    jobs: RayJobs,
    monkeypatch: pytest.MonkeyPatch,
    statuses: list[dict[str, str] | int],
    code: int,
) -> None:
    server.statuses = statuses
    assert night(jobs, monkeypatch) == code
    assert server.jobs["wiseline-round-2026-11-21"]["spec"]["suspend"] is False
    assert server.tokens == {"Bearer secret"}


def test_a_day_has_one_job_and_a_second_pod_watches_it(
    server: ApiServer, jobs: RayJobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.statuses = [{"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]
    assert [night(jobs, monkeypatch), night(jobs, monkeypatch)] == [0, 0]
    assert "there already" in capsys.readouterr().out
    assert night(jobs, monkeypatch, day="2026-11-22") == 0
    assert len(server.jobs) == 3


def test_a_job_that_was_deleted_or_is_not_allowed_ends_the_watch(
    server: ApiServer, jobs: RayJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.statuses = [403]
    assert "HTTPError" in str(night(jobs, monkeypatch))


def test_an_api_server_that_stays_away_is_a_sentence(
    server: ApiServer, jobs: RayJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nightly_rayjob, "PATIENCE_SECONDS", -1)
    server.statuses = [CUT_SHORT]
    assert "could not be started or watched: IncompleteRead" in str(night(jobs, monkeypatch))


def test_it_needs_nothing_but_the_standard_library() -> None:
    program = "import sys, cluster.nightly_rayjob; print({'ray', 'yaml', 'pydantic'} & set(sys.modules))"
    command = [nightly_rayjob.sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"
