"""A night's round on KubeRay: one RayJob a day, made from the suspended template, watched until it ends.

Runs in a pod whose service account may create and get RayJobs; nothing but the standard library, so that it starts at
once. A pod that is started again finds the day's RayJob and goes on watching it. The exit status is the round's.
"""

import argparse
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
POLL_SECONDS = 15.0
TIMEOUT_SECONDS = 30
# A KubeRay operator or an API server that is upgraded is away for minutes.
PATIENCE_SECONDS = 900.0


@dataclass(frozen=True)
class RayJobs:
    """The RayJobs of one namespace at the API server `url`."""

    url: str
    namespace: str
    token_file: Path
    tls: ssl.SSLContext | None

    def get(self, name: str) -> dict[str, Any]:
        return self._call("GET", f"/{name}")

    def create(self, job: Mapping[str, Any]) -> bool:
        """False when the name is taken."""
        try:
            self._call("POST", "", job)
        except urllib.error.HTTPError as error:
            if error.code == 409:
                return False
            raise
        return True

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.url}/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            # The token is renewed on disk; it is read each time.
            headers={
                "authorization": f"Bearer {self.token_file.read_text().strip()}",
                "content-type": "application/json",
            },
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS, context=self.tls) as response:
            said: dict[str, Any] = json.load(response)
            return said


def in_cluster() -> RayJobs:
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    return RayJobs(
        url=f"https://{host}:{port}",
        namespace=(ACCOUNT / "namespace").read_text().strip(),
        token_file=ACCOUNT / "token",
        tls=ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt")),
    )


def of_the_day(template: Mapping[str, Any], *, day: str, owner: Mapping[str, str] | None) -> dict[str, Any]:
    """The template, awake and named after the day. It goes when its owner, the CronJob's Job, goes."""
    metadata = template["metadata"]
    job: dict[str, Any] = {
        "apiVersion": template["apiVersion"],
        "kind": template["kind"],
        "metadata": {
            "name": f"{metadata['name']}-{day}",
            "labels": {**metadata.get("labels", {}), "wiseline.io/day": day},
        },
        "spec": {**template["spec"], "suspend": False},
    }
    if owner is not None:
        job["metadata"]["ownerReferences"] = [{"apiVersion": "batch/v1", "kind": "Job", **owner}]
    return job


def watch(jobs: RayJobs, name: str, *, poll_seconds: float = POLL_SECONDS) -> int:
    """0 when the round ended well, 1 when it did not. Raises OSError or HTTPException when the API server is
    away for too long."""
    told, heard = "", time.monotonic()
    while True:
        try:
            status = jobs.get(name).get("status", {})
            heard = time.monotonic()
        except (OSError, HTTPException) as error:  # the latter: an answer that breaks off
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429
            if refused or time.monotonic() - heard > PATIENCE_SECONDS:
                raise
            status = {}
        state = " ".join(status.get(key, "") for key in ("jobDeploymentStatus", "jobStatus", "message")).strip()
        if state and state != told:
            print(f"{name}: {state}", flush=True)
            told = state
        # Between attempts KubeRay says Retrying; Complete and Failed are the last words.
        match status.get("jobDeploymentStatus"):
            case "Complete":
                return 0 if status.get("jobStatus") == "SUCCEEDED" else 1
            case "Failed":
                return 1
        time.sleep(poll_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Creates today's RayJob from a template and watches it end.")
    parser.add_argument("--template", required=True, help="name of the suspended RayJob")
    parser.add_argument("--day", default=f"{datetime.now(UTC):%Y-%m-%d}", help="default: today, in UTC")
    options = parser.parse_args()
    owner = {"name": os.environ["JOB_NAME"], "uid": os.environ["JOB_UID"]} if os.environ.get("JOB_UID") else None
    try:
        jobs = in_cluster()
        job = of_the_day(jobs.get(options.template), day=options.day, owner=owner)
        name = job["metadata"]["name"]
        print(f"{name}: {'created' if jobs.create(job) else 'there already'}", flush=True)
        ended = watch(jobs, name)
    except (OSError, HTTPException, KeyError, ValueError) as error:
        sys.exit(f"The night's round could not be started or watched: {type(error).__name__}: {error}")
    sys.exit(ended)


if __name__ == "__main__":
    main()
