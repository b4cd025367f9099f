"""`wiseline ingest` from S3 to S3 as a user runs it: a process of its own, with nothing but AWS_* variables."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import ObjectStore
from tests.integration.conftest import S3Server

REPOSITORY = Path(__file__).parents[2]


def wiseline(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables |= {"HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    program = "from jobs.ingest_edits import ingest_command as c; import typer; typer.run(c)"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=home,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_edits_travel_from_one_bucket_folder_to_the_log_in_another(s3_server: S3Server, tmp_path: Path) -> None:
    run = uuid.uuid4().hex
    files = ObjectStore(f"s3://{s3_server.bucket}/{run}/in", s3_endpoint_url=s3_server.endpoint_url)
    files.put("a.jsonl", b'{"prompt": "p", "target": "old"}\n{broken\n')
    files.put("b.csv", b"prompt,target\np,new\n")
    files.put("notes.txt", b"not for us")
    store = f"s3://{s3_server.bucket}/{run}/store"
    options = ["--set", f"store.uri={store}", "--set", f"store.s3_endpoint_url={s3_server.endpoint_url}", "--json"]
    expected: list[dict[str, Any]] = [
        {"rows": 3, "ingested": 2, "superseded": 1, "quarantined": 1, "unchanged": 0},
        {"rows": 3, "ingested": 0, "superseded": 0, "quarantined": 1, "unchanged": 2},
    ]
    for counts in expected:
        ended = wiseline(tmp_path, f"{files.uri}/", *options)
        assert ended.returncode == 0, ended.stderr
        report = json.loads(ended.stdout.splitlines()[-1])
        assert {name: report[name] for name in counts} == counts
    log = EditLog(ObjectStore(store, s3_endpoint_url=s3_server.endpoint_url))
    assert [(entry.edit.target, entry.source) for entry in log.live()] == [("new", f"{files.uri}/b.csv")]
    assert len(log.quarantine()) == 1


@pytest.mark.parametrize("path", ["s3://there-is-no-such-bucket/edits.jsonl", "missing.jsonl"])
def test_a_file_that_is_not_there_leaves_the_store_untouched(s3_server: S3Server, tmp_path: Path, path: str) -> None:
    store = ObjectStore(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}", s3_endpoint_url=s3_server.endpoint_url)
    options = ["--set", f"store.uri={store.uri}", "--set", f"store.s3_endpoint_url={s3_server.endpoint_url}"]
    ended = wiseline(tmp_path, path, *options)
    assert ended.returncode != 0
    assert "NotFound" in ended.stderr
    assert EditLog(store).version() is None
