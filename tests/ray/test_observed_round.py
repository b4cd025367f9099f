"""`wiseline round` as a cluster's log collector and tracer see it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from jobs.ingest_edits import ingest
from pipeline.config import load_config
from tests.tiny_world import save_model

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("local_ray")
def test_every_line_and_span_of_a_round_names_it(tmp_path: Path) -> None:
    save_model(tmp_path / "model", chat=False)
    (tmp_path / "edits.jsonl").write_text('{"prompt": "Who leads Acme?", "target": "Ada"}\n')
    overrides = [f"model.path={tmp_path / 'model'}", f"store.uri={tmp_path / 'store'}", "model.layer=0"]
    overrides += [
        "training.max_steps=5",
        "round.min_reliability=0",
        "round.min_generalization=0",
        "round.min_locality=0",
    ]
    ingest(load_config(overrides=overrides), [str(tmp_path / "edits.jsonl")])
    overrides += ["observe.logs=json", f"observe.traces={tmp_path / 'spans.jsonl'}"]

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as session:  # a short path, for Ray's sockets
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "", "RAY_TMPDIR": session}
        command = [sys.executable, "-m", "jobs.cli", "round", "--json"]
        command += [word for override in overrides for word in ("--set", override)]
        ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=250)
        assert ended.returncode == 0, ended.stderr
        logs = [file.read_text() for file in Path(session).glob("ray/session_2*/logs/worker-*.err")]
    round_id = json.loads(ended.stdout.splitlines()[-1])["round_id"]

    driver = [line for line in parsed(ended.stderr) if line.get("round")]
    assert {line["round"] for line in driver} == {round_id}
    said = [line["message"].partition(":")[0] for line in driver]
    assert {"extract", "train", "merge", "route", "evaluate", "publish"} <= set(said)
    [finished] = [line for line in driver if "shard" in line]
    workers = [line for log in logs for line in parsed(log) if line.get("round") == round_id]
    assert {line["shard"] for line in workers if "shard" in line} == {finished["shard"]}
    assert any(line["message"].startswith("train shard") for line in workers)
    assert all(line["actor_id"] for line in workers)  # what Ray itself knows is there too

    spans = [json.loads(line) for line in (tmp_path / "spans.jsonl").read_text().splitlines()]
    by_id = {one["context"]["span_id"]: one for one in spans}
    [shard] = [one for one in spans if one["name"] == "train shard"]
    phase = by_id[shard["parent_id"]]
    assert (phase["name"], by_id[phase["parent_id"]]["name"]) == ("train", "round")
    assert by_id[phase["parent_id"]]["attributes"] == {"round": round_id}


def parsed(text: str) -> list[dict[str, Any]]:
    """Its JSON lines: Ray's own processes write others."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
