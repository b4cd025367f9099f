"""Which job a day's round is, by those that the cluster already has."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.submit import submit_once_a_day


@dataclass
class Server:
    """Takes an id once, as Ray's does."""

    jobs: dict[str, JobStatus] = field(default_factory=dict)

    def submit_job(self, *, submission_id: str, **job: Any) -> None:
        if submission_id in self.jobs:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists. Please use another.")
        self.jobs[submission_id] = JobStatus.PENDING

    def get_job_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(status=self.jobs[name])


def submit(server: Server) -> tuple[str, bool]:
    return submit_once_a_day(cast(JobSubmissionClient, server), "round", entrypoint="true")


@pytest.mark.parametrize("status", [JobStatus.PENDING, JobStatus.RUNNING, JobStatus.SUCCEEDED])
def test_the_days_round_is_the_one_that_is_there(status: JobStatus) -> None:
    server = Server()
    assert submit(server) == ("round", True)
    server.jobs["round"] = status
    assert submit(server) == ("round", False)
    assert server.jobs == {"round": status}


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.STOPPED])
def test_one_that_failed_is_submitted_again(status: JobStatus) -> None:
    server = Server({"round": status})
    assert submit(server) == ("round-2", True)
    assert submit(server) == ("round-2", False)
    server.jobs["round-2"] = status
    assert submit(server) == ("round-3", True)


def test_other_refusals_are_raised() -> None:
    server = Server()
    server.submit_job = lambda **job: (_ for _ in ()).throw(RuntimeError("no"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no"):
        submit(server)
