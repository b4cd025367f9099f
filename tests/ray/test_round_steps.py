"""A round driven step by step, as a workflow engine does, ends with the bytes of a whole round."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from pipeline.config import Config, load_config
from pipeline.errors import ConfigError, GateFailed, NotFound, WiselineError
from pipeline.rounds import evaluate_step, merge_step, plan_step, publish_step, run_round, train_step
from pipeline.storage.object_store import open_store
from pipeline.storage.releases import head, release_numbers
from tests.ray.test_round import LETTERS, SETTINGS, edits, ingest, release_bytes
from tests.tiny_world import save_model

pytestmark = pytest.mark.usefixtures("local_ray")
DEADLINE = 240  # seconds
Configure = Callable[..., Config]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    model = save_model(tmp_path / "model", chat=False)
    return lambda store, *overrides: load_config(
        overrides=[*SETTINGS, f"model.path={model}", f"store.uri={tmp_path / store}", *overrides]
    )


def command(config: Config, *words: str) -> subprocess.Popen[str]:
    """`wiseline round …` in a process of its own, on this test's cluster."""
    file = Path(config.store.uri).parent / "config.json"  # JSON is YAML
    file.write_text(config.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "round", "--config", str(file), *words],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def printed(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, (out, err)
    return out


def kill_when_extracted(config: Config, process: subprocess.Popen[str], *, there: int) -> None:
    store, deadline = open_store(config.store), time.monotonic() + DEADLINE
    try:
        while sum(path.endswith("/states.parquet") for path in store.list("shards")) < there:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.timeout(1200)
def test_a_round_by_steps_has_the_bytes_of_a_whole_one(configure: Configure, tmp_path: Path) -> None:
    """Shards are trained by processes side by side, one of which is killed and taken again; every step is repeated."""
    whole, steps = configure("whole"), configure("steps")
    for config in (whole, steps):
        ingest(config, edits(LETTERS[:8]), tmp_path, "edits")
    run_round(whole)

    planned = json.loads(printed(command(steps, "--step", "plan")))
    round_id, shards = planned["round"], planned["shards"]
    assert (shards, planned["stands"]) == ([0, 1, 2, 3], None)
    assert plan_step(steps) == (round_id, shards, None)
    with pytest.raises(WiselineError, match=r"4 of 4 shards .* \(0, 1, 2, 3\); run `--step train` first"):
        merge_step(steps, round_id)
    with pytest.raises(WiselineError, match=r"2 of 2 memories .* run `--step merge` first"):
        evaluate_step(steps, round_id)
    with pytest.raises(WiselineError, match="run `--step evaluate` first"):
        publish_step(steps, round_id)

    killed = command(steps, "--step", "train", "--round", round_id, "--shard", "0")
    kill_when_extracted(steps, killed, there=1)
    side_by_side = [
        command(steps, "--step", "train", "--round", round_id, "--shard", "0", "--shard", "3"),
        command(steps, "--step", "train", "--round", round_id, "--shard", "1"),
    ]
    assert [printed(each) for each in side_by_side][1] == "Trained shards: 1\n"
    assert train_step(steps, round_id, None) == [2]
    assert train_step(steps, round_id, [0]) == []

    ingest(steps, edits("z"), tmp_path, "said meanwhile")  # the round answers for the log as it was planned
    assert (merge_step(steps, round_id), merge_step(steps, round_id)) == (2, 0)
    assert (evaluate_step(steps, round_id), evaluate_step(steps, round_id)) == (True, False)
    assert printed(command(steps, "--step", "publish", "--round", round_id)) == "Release 1 published.\n"
    assert release_bytes(steps) == release_bytes(whole)

    again = publish_step(steps, round_id)
    assert (again.published, again.release.number) == (False, 1)
    assert (train_step(steps, round_id, None), merge_step(steps, round_id)) == ([], 0)
    assert not evaluate_step(steps, round_id)
    assert release_numbers(open_store(steps.store)) == [1]
    assert plan_step(whole)[1:] == ([], head(open_store(whole.store)))


def test_steps_that_cannot_be_taken_are_a_sentence(configure: Configure, tmp_path: Path) -> None:
    config = configure("store", "round.min_reliability=1", "training.max_steps=1", "merge.polish_steps=0")
    ingest(config, edits("abc"), tmp_path, "edits")
    with pytest.raises(NotFound, match="run `wiseline round --step plan` first"):
        train_step(config, "0123", None)
    round_id, shards, _ = plan_step(config)
    with pytest.raises(ConfigError, match="has 2 shards, numbered from 0; there is no shard 2"):
        train_step(config, round_id, [0, 2])
    with pytest.raises(ConfigError, match="another config or base model"):
        train_step(config.overridden(["training.max_steps=2"]), round_id, None)
    assert train_step(config, round_id, shards) == shards
    assert merge_step(config, round_id) == 1
    for _ in range(2):
        with pytest.raises(GateFailed, match=r"below round\.min_reliability"):
            evaluate_step(config, round_id)
    with pytest.raises(WiselineError, match="run `--step evaluate` first"):
        publish_step(config, round_id)
    with pytest.raises(GateFailed):
        plan_step(config)
